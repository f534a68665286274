"""What one request may ask for: a mistake, or malice, must not fill the memory or the time.

Each is enforced when the request is made, on the caller's thread, before any tensor is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Limit:
    """The smallest and the largest value, or number, that is allowed."""

    low: float
    high: float
    unit: str


LIMITS = {
    "prompt": Limit(1, INT32_MAX, "tokens; with max_tokens at most max_model_len"),
    "max_tokens": Limit(1, INT32_MAX, "tokens; with the prompt at most max_model_len"),
    "n": Limit(1, 16384, "outputs of one prompt"),
    "logprobs": Limit(0, 1000, "likely tokens beside each token"),
    "processed_logprobs": Limit(0, 1000, "likely tokens beside each token"),
    "prompt_logprobs": Limit(0, 1000, "likely tokens beside each token of the prompt"),
    "stop": Limit(0, 1024, "strings"),
    "stop[i]": Limit(1, 1024, "characters"),
    "stop_token_ids": Limit(0, 1024, "ids"),
    "logit_bias": Limit(0, 4096, "ids"),
    "logit_bias[i]": Limit(-100.0, 100.0, "added to a logit"),
    "bad_words": Limit(0, 1024, "strings or sequences of ids"),
    "bad_words[i]": Limit(1, 1024, "characters or ids"),
    "priority": Limit(-1000, 1000, "levels; lower is earlier"),
    "deadline_s": Limit(0.0, 1e7, "seconds"),
}


def markdown() -> Iterator[str]:
    """The table as lines of Markdown, for the README."""
    yield "| | at least | at most | |"
    yield "|---|---|---|---|"
    for name, limit in LIMITS.items():
        title = f"each of `{name.removesuffix('[i]')}`" if name.endswith("[i]") else f"`{name}`"
        yield f"| {title} | {limit.low:,} | {limit.high:,} | {limit.unit} |"
