"""What a user can set: `Config` for a model, `SamplingParams` for a request."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .errors import InvalidRequestError

INT32_MAX = 2**31 - 1
SEED_MAX = 2**63 - 1
WEIGHT_CHECKS = ("sampled", "full", "manual")


def check_int(
    name: str, value: object, low: int, high: int, error: type[ValueError] = ValueError
) -> None:
    """Raise `error` unless `value` is an int (not a bool) with low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise error(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if not low <= value <= high:
        raise error(f"{name} must be between {low} and {high}, got {value}")


def check_float(
    name: str, value: object, low: float, high: float, error: type[ValueError] = ValueError
) -> None:
    """Raise `error` unless `value` is a finite int or float (not a bool), low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise error(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not low <= value <= high:  # false for NaN too
        raise error(f"{name} must be a finite number between {low} and {high}, got {value}")


@dataclass(frozen=True)
class Config:
    """Settings of one optimised model; immutable, shown by `explain`.

    Attributes:
        max_num_seqs: Sequences that may run in one step.
        max_num_batched_tokens: Tokens computed in one step; longer prompts are chunked.
        max_model_len: Longest sequence (prompt + output) in tokens; None: the model's own limit.
        block_size: Tokens per block of the paged KV cache: 16, 32 or 64.
        kv_cache_memory_bytes: Size of the KV cache pool; None: as much as the calls can need, at
            most half of the memory that is free when the pool is created.
        weight_check: How new weight values are noticed when torch's version counters do not show
            them: "sampled" compares a cache line of every 4 KiB page before an idle engine starts,
            "full" every byte, "manual" nothing: then tell `fastgen.weights_changed(model)`.
        passes_off: Names of optional passes that are left out.
    Raises: ValueError for a value out of range, TypeError for an unknown field.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    weight_check: str = "sampled"
    passes_off: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_int("max_num_seqs", self.max_num_seqs, 1, 1 << 16)
        check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 20)
        if self.max_model_len is not None:
            check_int("max_model_len", self.max_model_len, 1, INT32_MAX)
        check_int("block_size", self.block_size, 16, 64)
        if self.block_size not in (16, 32, 64):
            raise ValueError(f"block_size must be 16, 32 or 64, got {self.block_size!r}")
        if self.kv_cache_memory_bytes is not None:
            check_int("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 1 << 50)
        if self.weight_check not in WEIGHT_CHECKS:
            raise ValueError(
                f"weight_check must be one of {', '.join(WEIGHT_CHECKS)}, got {self.weight_check!r}"
            )
        if isinstance(self.passes_off, str):
            raise ValueError(f"passes_off must be a sequence of names, got {self.passes_off!r}")
        object.__setattr__(self, "passes_off", tuple(self.passes_off))

    def replace(self, **fields: Any) -> Config:
        """Return a copy with some fields changed; unknown names raise TypeError."""
        known = {field.name for field in dataclasses.fields(self)}
        for name in fields:
            if name not in known:
                raise TypeError(
                    f"Config has no field {name!r}; its fields are {', '.join(sorted(known))}"
                )
        return dataclasses.replace(self, **fields)


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Names, defaults and order (temperature, top-k, top-p) are vLLM's.

    Attributes:
        max_tokens: Most tokens that are generated.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches top_p; 1 keeps all.
        seed: Seed of the request's own generator; None draws one from torch's default generator.
        stop_token_ids: Tokens that end the request besides the model's end tokens.
        ignore_eos: Go on past the model's end tokens.
    Raises: InvalidRequestError for a value out of range or of the wrong type.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        error = InvalidRequestError
        check_int("max_tokens", self.max_tokens, 1, INT32_MAX, error)
        check_float("temperature", self.temperature, 0.0, 1e6, error)
        check_int("top_k", self.top_k, 0, INT32_MAX, error)
        check_float("top_p", self.top_p, 0.0, 1.0, error)
        if self.top_p == 0.0:
            raise error("top_p must be > 0, got 0; for greedy decoding use temperature=0")
        if self.seed is not None:
            check_int("seed", self.seed, 0, SEED_MAX, error)
        if not isinstance(self.stop_token_ids, list | tuple | set | frozenset):
            raise error(f"stop_token_ids must be a list of ints, got {self.stop_token_ids!r}")
        for token_id in self.stop_token_ids:
            check_int("each of stop_token_ids", token_id, 0, INT32_MAX, error)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise error(f"ignore_eos must be a bool, got {self.ignore_eos!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0
