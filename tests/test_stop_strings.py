"""Stop strings: where the text ends, what a stream holds back. In the engine: engine/test_stops."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fastgen import SamplingParams
from fastgen.cli.models import demo_model_dir
from fastgen.text import TextStream


class Bytes:
    """A token is a byte."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Pieces:
    """A token is a piece of text of any length."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.pieces[token_id] for token_id in ids)


def cut(text: str, stops: tuple[str, ...], include: bool = False) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first, found character by character."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(tokenizer, ids: list[int], last: bool = True, **fields) -> tuple[list[str], str | None]:
    """What a stream gives for each token and at the end, and the stop string that was met."""
    params = SamplingParams(max_tokens=1000, **fields)
    stream = TextStream(tokenizer, params)
    pieces = [stream.take([token_id]) for token_id in ids]
    return [*pieces, stream.take([], last=True)] if last else pieces, stream.matched


def streamed(*pieces: str, **fields) -> tuple[list[str], str | None]:
    return run(Pieces(*pieces), list(range(len(pieces))), **fields)


# What is held back.


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["a", "b", "c"], ["x"], ["a", "b", "c", ""]),
        (["aS", "TO", "Pb"], ["STOP"], ["a", "", "", ""]),
        (["aS", "TO", "b"], ["STOP"], ["a", "", "STOb", ""]),
        (["aS", "TO"], ["STOP"], ["a", "", "STO"]),
        (["STOP"], ["STOP"], ["", ""]),
        (["xSTOPy", "z"], ["STOP"], ["x", "", ""]),
        (["aa", "ab"], ["aab"], ["", "a", ""]),
        (["a", "ba", "bc"], ["abc"], ["", "ab", "", ""]),
        (["\n", "\n", "x"], ["\n\n"], ["", "", "", ""]),
        (["s", "to", "p"], ["stop", "to"], ["", "s", "", ""]),
        (["ab", "cd"], ["abcd", "bc"], ["", "a", ""]),
        (["abcd"], ["abcd", "bc"], ["a", ""]),
        (["abc"], ["abc", "bc"], ["", ""]),
        (["abc"], ["bc", "abc"], ["", ""]),
        (["abc"], ["abc", "ab"], ["", ""]),
    ],
    ids=str,
)
def test_pieces(pieces, stops, expected):
    assert streamed(*pieces, stop=stops)[0] == expected


def test_stop_reason_is_the_one_complete_first_and_the_longer_of_two_that_end_together():
    for stops in (["abc", "ab"], ["ab", "abc"]):
        assert streamed("abc", stop=stops, include_stop_str_in_output=True) == (["ab", ""], "ab")
    for stops in (["abc", "bc"], ["bc", "abc"]):
        assert streamed("abc", stop=stops)[1] == "abc"


def test_stop_string_is_kept_where_that_is_asked_for():
    include = {"include_stop_str_in_output": True}
    assert streamed("aS", "TO", "Pb", stop="STOP", **include) == (["a", "", "STOP", ""], "STOP")
    assert streamed("STOP", stop="STOP", **include) == (["STOP", ""], "STOP")


def test_unfinished_characters_and_stops_are_held_together():
    pieces, matched = run(Bytes(), Bytes().encode("a👍é!"), stop=["👍é?"])
    assert pieces == ["a", *[""] * 6, "👍é!", ""]
    assert matched is None
    pieces, matched = run(Bytes(), Bytes().encode("a👍é!"), stop=["é"])
    assert pieces == ["a", "", "", "", "👍", "", "", "", ""]
    assert matched == "é"


def test_nothing_comes_after_a_stop():
    stream = TextStream(Pieces("aXb", "c"), SamplingParams(stop="X"))
    assert stream.push(0)
    assert stream.push(1)
    assert stream.take([1]) == ""
    assert stream.take([], last=True) == ""


# min_tokens.


@pytest.mark.parametrize(
    ("pieces", "stops", "min_tokens", "expected", "matched"),
    [
        (["X", "a", "X"], ["X"], 0, "", "X"),
        (["X", "a", "X"], ["X"], 1, "Xa", "X"),
        (["X", "a", "X"], ["X"], 2, "Xa", "X"),
        (["X", "a", "X"], ["X"], 3, "XaX", None),
        (["a", "S", "T", "b"], ["ST"], 2, "a", "ST"),
        (["a", "S", "T", "b"], ["ST"], 3, "aSTb", None),
        (["ab", "c", "d"], ["ab", "abX"], 1, "abcd", None),
        (["ab", "c", "X"], ["ab", "abcX"], 1, "", "abcX"),
        (["a", "a", "b"], ["aa"], 2, "aab", None),
        (["aa", "a", "b"], ["aa"], 1, "a", "aa"),
    ],
    ids=str,
)
def test_stops_complete_within_min_tokens_do_not_count(
    pieces, stops, min_tokens, expected, matched
):
    given, met = streamed(*pieces, stop=stops, min_tokens=min_tokens)
    assert ("".join(given), met) == (expected, matched)


# Any text, any stops, any tokens.

alphabet = st.text(alphabet="ab\nS é👍", max_size=14)
stop_lists = st.lists(st.text(alphabet="ab\nS é👍", min_size=1, max_size=4), min_size=1, max_size=3)


def check(tokenizer, ids: list[int], stops: list[str], include: bool) -> None:
    fields = {"stop": stops, "include_stop_str_in_output": include}
    pieces, matched = run(tokenizer, ids, **fields)
    expected = cut(tokenizer.decode(ids, skip_special_tokens=True), tuple(stops), include)
    assert ("".join(pieces), matched) == expected
    # Nothing that was shown is taken back, and what is certain is shown: at most a proper
    # beginning of a stop string, or of a character, is missing before the end.
    shown = ""
    for count, piece in enumerate(pieces[:-1], 1):
        shown += piece
        before = cut(tokenizer.decode(ids[:count], skip_special_tokens=True), tuple(stops), include)
        if before[1] is None and not before[0].endswith("\ufffd"):
            missing = before[0].removeprefix(shown)
            assert before[0].startswith(shown)
            assert not missing or any(stop.startswith(missing) for stop in stops)


@settings(deadline=None, max_examples=200)
@given(pieces=st.lists(alphabet, max_size=8), stops=stop_lists, include=st.booleans())
def test_any_pieces(pieces, stops, include):
    check(Pieces(*pieces), list(range(len(pieces))), stops, include)


@settings(deadline=None, max_examples=200)
@given(text=alphabet, stops=stop_lists, include=st.booleans(), cut_bytes=st.integers(0, 3))
def test_any_bytes(text, stops, include, cut_bytes):
    ids = Bytes().encode(text)
    check(Bytes(), ids[: len(ids) - cut_bytes], stops, include)


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_dir())


@settings(deadline=None, max_examples=100)
@given(data=st.data(), include=st.booleans())
def test_any_tokens_of_the_demo_model(demo_tokenizer, data, include):
    """Random tokens, and stops that are often parts of their text."""
    some = st.integers(0, len(demo_tokenizer) - 1)
    words = st.sampled_from(demo_tokenizer(" return self.value\n\n    def é👍(").input_ids)
    ids = data.draw(st.lists(st.one_of(some, words), max_size=15))
    text = demo_tokenizer.decode(ids, skip_special_tokens=True)
    stops = data.draw(stop_lists)
    if text:
        start = data.draw(st.integers(0, len(text) - 1))
        part = text[start : start + data.draw(st.integers(1, 6))]
        if "\ufffd" not in part:
            stops = [*stops, part]
    check(demo_tokenizer, ids, stops, include)


class HoldsNothing(TextStream):
    """Planted: the beginning of a stop string is shown."""

    def take(self, token_ids, last=False):
        return super().take(token_ids, last=True)


class StopsLate(TextStream):
    """Planted: the stop string that starts first counts."""

    def take(self, token_ids, last=False):
        text = super().take(token_ids, last)
        self._include = True
        return text


@pytest.mark.parametrize("broken", [HoldsNothing, StopsLate])
def test_planted_mistake_is_found(monkeypatch, broken):
    arguments = Pieces("aS", "T", "STx"), [0, 1, 2], ["ST"], False
    check(*arguments)
    monkeypatch.setitem(globals(), "TextStream", broken)
    with pytest.raises(AssertionError):
        check(*arguments)
