"""Between text and token ids: prompts and chat messages in, a stream of text out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

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
        ids = _need(tokenizer, "a text prompt")(prompt).input_ids
        bos = tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else list(ids)
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

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
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
        return self._tokenizer.decode(ids, skip_special_tokens=True)
