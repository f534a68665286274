"""Between text and token ids: prompts and chat messages in, a stream of text out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from .config import SamplingParams
from .errors import InvalidRequestError

# A prompt: text, token ids, or chat messages (dicts with role and content).
Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


def encode_prompt(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Token ids of a prompt.

    Text is tokenised with the tokenizer's special tokens, but never begins with two BOS; chat
    messages go through its chat template with the assistant's turn opened.

    Raises: InvalidRequestError for anything else, or where a tokenizer or template is missing.
    """
    if isinstance(prompt, str):
        ids = list(_need(tokenizer, "a text prompt")(prompt).input_ids)
        bos = tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        return ids
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()  # pyright: ignore  # a tensor or an array
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise InvalidRequestError(
            "a prompt must be a str, a list of token ids or a list of chat messages, got "
            f"{type(prompt).__name__}"
        )
    if prompt and all(isinstance(message, dict) for message in prompt):
        tokenizer = _need(tokenizer, "a chat prompt")
        if not tokenizer.chat_template:
            raise InvalidRequestError(
                "chat messages were given, and the tokenizer has no chat_template; set one or "
                "pass a str or token ids"
            )
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    return [_token_id(item) for item in prompt]


def _token_id(item: Any) -> int:
    """An int, or a numpy or torch integer, as an int."""
    try:
        if not isinstance(item, bool) and "bool" not in str(getattr(item, "dtype", "")):
            return operator.index(item)
    except TypeError:
        pass
    raise InvalidRequestError(f"each prompt token id must be an int, got {item!r}")


def _need(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise InvalidRequestError(f"{what} needs a tokenizer: Engine(model, tokenizer)")
    return tokenizer


class Detokenizer:
    """Turns a growing list of token ids into text, piece by piece.

    Bytes of an unfinished character are held back until it is whole. Only a short window of
    tokens is decoded at each step: the ids since the last piece and those of the piece before it,
    whose text is subtracted, because a token's text may depend on the token before it.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._start = 0  # of the piece before
        self._done = 0  # ids whose text was given out

    def push(self, token_ids: Sequence[int], last: bool = False) -> str:
        """The text that these ids complete; with `last`, everything that was held back too."""
        self._ids.extend(token_ids)
        before = self._decode(self._ids[self._start : self._done])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not last):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


class TextStream:
    """The text of one output as its tokens come, cut at the first stop string.

    The first is the one that is complete first; of two that end together, the longer one. So the
    cut does not depend on how the text is cut into tokens. One that is complete within the first
    min_tokens tokens does not count.

    The engine asks it whether a stop string is met; whoever streams asks another one, over the
    same tokens, for the text, of which the possible beginning of a stop string is held back.

    Attributes:
        matched: The stop string that was met.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens)
        self._stop, self._include = params.stop, params.include_stop_str_in_output
        self._min_tokens, self._num_tokens = params.min_tokens, 0
        self._held = ""
        self.matched: str | None = None

    def push(self, token_id: int, last: bool = False) -> bool:
        """Take a token, the last one perhaps; whether a stop string was met, now or before."""
        self.take([token_id], last)
        return self.matched is not None

    def take(self, token_ids: Sequence[int], last: bool = False) -> str:
        """The text that these ids make certain; with `last`, all that was held back too."""
        if self.matched is not None:
            return ""
        self._num_tokens += len(token_ids)
        piece = self._detokenizer.push(token_ids, last)
        before, text, self._held = len(self._held), self._held + piece, ""
        ends = [
            (at + len(stop), at, stop)
            for stop in self._stop
            if self._num_tokens > self._min_tokens
            and (at := text.find(stop, max(0, before + 1 - len(stop)))) >= 0
        ]
        if ends:
            end, start, self.matched = min(ends)
            return text[: end if self._include else start]
        held = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def bad_word_ids(
    words: Sequence[str | tuple[int, ...]], tokenizer: Any
) -> tuple[tuple[int, ...], ...]:
    """Token sequences of bad words: as they are, and as they follow a space.

    Raises: InvalidRequestError if a string is given and there is no tokenizer.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        if isinstance(word, str):
            encode = _need(tokenizer, "a bad word")
            for text in (word.lstrip(), f" {word.lstrip()}"):
                ids = tuple(encode(text, add_special_tokens=False).input_ids)
                if ids:
                    sequences[ids] = None
        else:
            sequences[word] = None
    return tuple(sequences)
