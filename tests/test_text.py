"""Prompts into token ids, and token ids into a stream of text.

The tokenizers are built here: byte-level BPE (as Qwen's or GPT-2's) whose tokens split characters,
and a word-boundary BPE with byte fallback (as Llama 2's), whose first token loses its space.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from fastgen.errors import InvalidRequestError
from fastgen.text import Detokenizer, encode_prompt

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello, hello! How are you today?  Two spaces\nand\n\nnew lines\tand tabs.",
    "你好，世界。今天天气很好。",  # noqa: RUF001
    "こんにちは、元気ですか。 日本語のテキスト",
    "naïve café déjà vu Straße Ωμέγα Привет",
    "👍🏽 👨‍👩‍👧‍👦 🎉🎉 🇩🇪 😀😃😄",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
BOS, EOS = 0, 1


def byte_level_tokenizer(vocab_size: int, *, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """Few merges leave characters in pieces; many make tokens of several characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case letters and word beginnings are tokens, everything else is bytes."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *letters, *(f"▁{letter}" for letter in letters)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", letter) for letter in letters],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def bytewise():
    """No merges: every byte is a token."""
    return byte_level_tokenizer(258)


@pytest.fixture(scope="module")
def merged():
    return byte_level_tokenizer(380)


@pytest.fixture(scope="module")
def fallback():
    return byte_fallback_tokenizer()


@pytest.fixture(scope="module")
def tokenizers(bytewise, merged, fallback):
    return {"bytewise": bytewise, "merged": merged, "fallback": fallback}


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


# encode_prompt.


def test_text_gets_the_special_tokens(merged):
    ids = encode_prompt("Hello", merged)
    assert type(ids) is list
    assert ids == [BOS, *ids_of(merged, "Hello")]


def test_text_of_a_tokenizer_without_bos():
    tokenizer = byte_level_tokenizer(300, adds_bos=False)
    assert encode_prompt("Hello", tokenizer) == ids_of(tokenizer, "Hello")


def test_text_that_begins_with_bos_does_not_get_two(merged):
    assert encode_prompt("<s>Hello", merged) == encode_prompt("Hello", merged)
    assert encode_prompt("<s><s>Hello", merged) == encode_prompt("Hello", merged)
    assert encode_prompt("<s>", merged) == encode_prompt("<s><s>", merged) == [BOS]


def test_rendered_chat_template_does_not_get_two_bos(merged):
    messages = [{"role": "user", "content": "Hello"}]
    rendered = merged.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<s>")
    assert encode_prompt(rendered, merged) == encode_prompt(messages, merged)


def test_bos_in_the_middle_of_a_text_stays(merged):
    ids = encode_prompt("Hello<s><s>", merged)
    assert ids == [BOS, *ids_of(merged, "Hello"), BOS, BOS]


def test_tokenizer_without_any_bos_token():
    tokenizer = byte_level_tokenizer(300, adds_bos=False)
    tokenizer.bos_token = None
    assert encode_prompt("aa", tokenizer) == ids_of(tokenizer, "aa")


def test_empty_text_is_the_bos(merged):
    assert encode_prompt("", merged) == [BOS]


def test_chat_opens_the_assistants_turn(merged):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好"},
    ]
    ids = encode_prompt(messages, merged)
    assert type(ids) is list
    assert merged.decode(ids) == "<s>[system] Be brief.\n[user] 你好\n[assistant] "
    assert ids.count(BOS) == 1
    assert all(type(token_id) is int for token_id in ids)


@pytest.mark.parametrize(
    "prompt",
    [
        [3, 1, 2],
        (3, 1, 2),
        np.array([3, 1, 2]),
        np.array([3, 1, 2], np.int32),
        torch.tensor([3, 1, 2]),
        torch.tensor([3, 1, 2], dtype=torch.int32),
        [np.int64(3), np.int32(1), 2],
        list(torch.tensor([3, 1, 2])),
    ],
    ids=["list", "tuple", "int64", "int32", "tensor", "tensor32", "numpy-scalars", "0-d-tensors"],
)
def test_token_ids_of_any_integer_kind(prompt):
    ids = encode_prompt(prompt, None)
    assert ids == [3, 1, 2]
    assert type(ids) is list
    assert all(type(token_id) is int for token_id in ids)


def test_token_ids_are_a_copy_and_get_no_special_tokens(merged):
    prompt = [5, 6]
    ids = encode_prompt(prompt, merged)
    prompt.append(7)
    assert ids == [5, 6]


@pytest.mark.parametrize("prompt", [[], (), np.array([], np.int64)], ids=["list", "tuple", "array"])
def test_no_token_ids(prompt):
    assert encode_prompt(prompt, None) == [], "the engine refuses it, with its reason"


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        1.5,
        b"Hello",
        bytearray(b"Hello"),
        {"role": "user", "content": "Hello"},
        {1, 2},
        iter([1, 2]),
        object(),
        np.int64(3),
        torch.tensor(3),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_wrong_types_are_refused(merged, prompt):
    with pytest.raises(InvalidRequestError, match="prompt"):
        encode_prompt(prompt, merged)


@pytest.mark.parametrize(
    "prompt",
    [
        [1, True],
        [1.0],
        [1, None],
        ["Hello"],
        [[1, 2]],
        [1, {"role": "user", "content": "Hello"}],
        [{"role": "user", "content": "Hello"}, 1],
        np.array([1.0]),
        np.array([[1, 2]]),
        np.array([True]),
        [np.float64(1.0)],
        [np.bool_(True)],
        torch.tensor([1.0]),
        torch.tensor([[1, 2]]),
        torch.tensor([True]),
        [torch.tensor(1.5)],
        [torch.tensor(True)],
        [torch.tensor([1, 2])],
    ],
    ids=repr,
)
def test_wrong_elements_are_refused(merged, prompt):
    with pytest.raises(InvalidRequestError, match="each prompt token id must be an int"):
        encode_prompt(prompt, merged)


@pytest.mark.parametrize(
    ("prompt", "what"), [("Hello", "text"), ([{"role": "user", "content": "Hello"}], "chat")]
)
def test_missing_tokenizer_is_named(prompt, what):
    with pytest.raises(InvalidRequestError, match=f"{what} prompt needs a tokenizer"):
        encode_prompt(prompt, None)


def test_missing_chat_template_is_named(fallback):
    assert fallback.chat_template is None
    with pytest.raises(InvalidRequestError, match="chat_template"):
        encode_prompt([{"role": "user", "content": "Hello"}], fallback)


# Detokenizer.


def pieces_of(detokenizer, token_ids: list[int]) -> list[str]:
    """What a stream gives: a piece per token, and the rest at the end."""
    pieces = [detokenizer.push([token_id]) for token_id in token_ids]
    return [*pieces, detokenizer.push([], last=True)]


def check_stream(detokenizer, tokenizer, token_ids: list[int]) -> list[str]:
    """The pieces are the full decode, and no piece holds half a character that becomes whole."""
    pieces = pieces_of(detokenizer, token_ids)
    full = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert "".join(pieces) == full
    if "\ufffd" not in full:
        assert not any("\ufffd" in piece for piece in pieces)
    return pieces


@pytest.mark.parametrize("text", LINES, ids=range(len(LINES)))
@pytest.mark.parametrize("name", ["bytewise", "merged", "fallback"])
def test_pieces_are_the_full_decode(tokenizers, name, text):
    tokenizer = tokenizers[name]
    ids = ids_of(tokenizer, text)
    pieces = check_stream(Detokenizer(tokenizer), tokenizer, ids)
    assert tokenizer.decode(ids) == text
    assert len(ids) > 10
    assert sum(map(bool, pieces)) > len(text) // 8, "text comes as it is made, not at the end"


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=30))
def test_pieces_are_the_full_decode_of_any_text(tokenizers, text):
    for tokenizer in tokenizers.values():
        check_stream(Detokenizer(tokenizer), tokenizer, ids_of(tokenizer, text))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_pieces_are_the_full_decode_of_any_ids(bytewise, merged, data):
    """What a model may sample: broken UTF-8, special tokens anywhere."""
    for tokenizer in (bytewise, merged):
        ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=25))
        check_stream(Detokenizer(tokenizer), tokenizer, ids)


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=20), counts=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_any_number_of_tokens_at_a_time(tokenizers, text, counts):
    for tokenizer in tokenizers.values():
        ids, pieces, detokenizer = ids_of(tokenizer, text), [], Detokenizer(tokenizer)
        rest = list(ids)
        for count in itertools.cycle([*counts, 1]):
            pieces.append(detokenizer.push(rest[:count]))
            del rest[:count]
            if not rest:
                break
        pieces.append(detokenizer.push([], last=True))
        assert "".join(pieces) == tokenizer.decode(ids)


def test_unfinished_characters_are_held_back(bytewise):
    ids = ids_of(bytewise, "a👍é")
    assert len(ids) == 1 + 4 + 2
    assert pieces_of(Detokenizer(bytewise), ids) == ["a", "", "", "", "👍", "", "é", ""]


def test_unfinished_characters_are_held_back_with_byte_fallback(fallback):
    ids = ids_of(fallback, "a你b")
    assert len(ids) == 1 + 3 + 1
    assert pieces_of(Detokenizer(fallback), ids) == ["a", "", "", "你", "b", ""]


def test_last_gives_the_rest(bytewise):
    ids = ids_of(bytewise, "a👍")[:-1]
    detokenizer = Detokenizer(bytewise)
    assert [detokenizer.push([token_id]) for token_id in ids] == ["a", "", "", ""]
    assert detokenizer.push([], last=True) == "\ufffd"
    assert detokenizer.push([], last=True) == ""


def test_last_with_tokens(merged):
    ids = ids_of(merged, "Hello you")
    assert Detokenizer(merged).push(ids, last=True) == "Hello you"


def test_nothing_gives_nothing(merged):
    detokenizer = Detokenizer(merged)
    assert detokenizer.push([]) == ""
    assert detokenizer.push([], last=True) == ""


def test_a_real_replacement_character_arrives(bytewise):
    """U+FFFD may be what the model means; it comes with the next token or at the end."""
    ids = ids_of(bytewise, "a\ufffdb")
    assert "".join(pieces_of(Detokenizer(bytewise), ids)) == "a\ufffdb"
    assert "".join(pieces_of(Detokenizer(bytewise), ids[:-1])) == "a\ufffd"


def test_special_tokens_give_no_text(merged):
    ids = [BOS, *ids_of(merged, "Hello"), EOS]
    pieces = check_stream(Detokenizer(merged), merged, ids)
    assert "".join(pieces) == "Hello"
    assert pieces[-2:] == ["", ""]


def test_spaces_between_pieces_are_kept(fallback):
    ids = ids_of(fallback, "ab cd  e")
    assert "".join(pieces_of(Detokenizer(fallback), ids)) == "ab cd  e"


def test_only_a_short_window_is_decoded():
    """The cost of a step must not grow with the text."""
    longest = 0

    class Counting:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def decode(self, ids, **kwargs):
            nonlocal longest
            longest = max(longest, len(ids))
            return self.tokenizer.decode(ids, **kwargs)

    tokenizer = byte_level_tokenizer(300)
    ids = ids_of(tokenizer, " ".join(LINES) * 3)
    assert len(ids) > 500
    check_stream(Detokenizer(Counting(tokenizer)), tokenizer, ids)
    assert longest < 20


# Planted mistakes.


class DecodesEachToken:
    """Loses the space of a word's first token, and breaks characters."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def push(self, ids, last=False):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class HoldsNothingBack(Detokenizer):
    def push(self, ids, last=False):
        return super().push(ids, last=True)


class NeverGivesTheRest(Detokenizer):
    def push(self, ids, last=False):
        return super().push(ids)


@pytest.mark.parametrize(
    ("broken", "name", "text", "cut"),
    [
        (DecodesEachToken, "fallback", "ab cd", 0),
        (DecodesEachToken, "bytewise", "你", 0),
        (HoldsNothingBack, "bytewise", "a👍", 0),
        (NeverGivesTheRest, "bytewise", "a👍", 1),
    ],
    ids=["space", "characters", "hold", "rest"],
)
def test_planted_mistake_is_found(tokenizers, broken, name, text, cut):
    tokenizer = tokenizers[name]
    ids = ids_of(tokenizer, text)
    ids = ids[: len(ids) - cut]
    check_stream(Detokenizer(tokenizer), tokenizer, ids)
    with pytest.raises(AssertionError):
        check_stream(broken(tokenizer), tokenizer, ids)


def test_fixture_tokens_split_characters(merged):
    """What these tests are worth: random merged tokens do end inside characters."""
    rng = random.Random(0)
    ids = [rng.randrange(2, len(merged)) for _ in range(100)]
    assert any("\ufffd" in merged.decode([token_id]) for token_id in ids)
    assert any(len(merged.decode([token_id])) > 1 for token_id in ids)
