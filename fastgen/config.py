"""What a user can set: `Config` for a model, `SamplingParams` for a request."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from .errors import InvalidRequestError
from .limits import INT32_MAX, LIMITS

SEED_MAX = 2**63 - 1
CODEGENS = ("auto", "direct", "inductor")
WEIGHT_CHECKS = ("sampled", "full", "manual")
MIN_REPETITION_PENALTY = 1e-6  # logits divided by less could leave fp32


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


def check_limit(name: str, value: object) -> None:
    """Raise InvalidRequestError unless a number is within its limit (`fastgen.limits`)."""
    limit = LIMITS[name]
    check = check_float if isinstance(limit.high, float) else check_int
    check(name, value, limit.low, limit.high, InvalidRequestError)  # pyright: ignore


def check_length(name: str, value: Collection[Any]) -> None:
    """Raise InvalidRequestError unless there are as many as the limit allows."""
    limit = LIMITS[name]
    if not limit.low <= len(value) <= limit.high:
        raise InvalidRequestError(
            f"{name} must have {limit.low} to {limit.high} {limit.unit}, got {len(value)}"
        )


@dataclass(frozen=True)
class Config:
    """Settings of one optimised model; immutable, shown by `explain`.

    Attributes:
        max_num_seqs: Sequences that may run in one step.
        max_num_batched_tokens: Tokens computed in one step; longer prompts are chunked. Running
            requests get their token in each step first, so it bounds how long they wait for it.
        max_queue: Most requests that may wait to run, of those that come through an `Engine`;
            more raise QueueFullError. None: any number.
        max_model_len: Longest sequence (prompt + output) in tokens; None: the model's own limit.
        gpu_memory_utilization: Share of a GPU's memory that an `Engine` may fill with all it needs:
            weights, activations, captured decode steps and the KV cache, which gets the rest. What
            `generate` alone uses is bounded as kv_cache_memory_bytes says.
        enforce_eager: Launch each kernel of a decode step, instead of capturing steps as CUDA
            graphs and replaying them.
        block_size: Tokens per block of the paged KV cache: 16, 32 or 64.
        kv_cache_memory_bytes: Size of the KV cache pool; None: as much as the calls can need, at
            most half of the memory that is free when the pool is created.
        prefix_cache: Keep the blocks of finished requests, and share blocks between requests that
            begin alike.
        weight_check: How new weight values are noticed when torch's version counters do not show
            them: "sampled" compares a cache line of every 4 KiB page before an idle engine starts,
            "full" every byte, "manual" nothing: then tell `fastgen.weights_changed(model)`.
        pack: Copies of the weights in the layout of the processor's GEMM, which is faster: "auto"
            makes them within a quarter of the free memory, True whatever it is, False never.
        release_weights: Free each weight that was packed, which halves the memory (CPU, bf16).
            The model generates and can be saved; its forward, training and moves raise
            ReleasedWeightsError until `fastgen.restore(model)`. "auto" then packs everything.
        passes_off: Names of optional passes that are left out.
        codegen: What runs the rewritten graph: "direct" the kernels by themselves, at once;
            "inductor" torch's Inductor, which compiles for a while what lies between them. "auto"
            is "direct".
        deterministic: A token's logits are the same to the last bit whatever else is in the batch:
            other requests, chunks of the prompt, blocks found in the prefix cache, preemption. For
            models on the CPU, with direct code; one with an operation for which that cannot be
            promised is refused by its name; calls that run in transformers' loop have no such
            promise. Bits may still differ between machines, versions, and what `pack` packed.
        watchdog_s: Warn of a step, or of a caller whose processors, criteria or streamer choose the
            next tokens of a batch, that takes longer, with its stack; None: never.
        graph_cache: Keep the rewritten graph on disk, in `FASTGEN_CACHE_DIR` or the user's cache
            folder, so that the next start of the same model does not trace it again.
    Raises: ValueError for a value out of range, TypeError for an unknown field.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_queue: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    prefix_cache: bool = True
    weight_check: str = "sampled"
    pack: bool | str = "auto"
    release_weights: bool = False
    passes_off: tuple[str, ...] = ()
    codegen: str = "auto"
    graph_cache: bool = True
    deterministic: bool = False
    watchdog_s: float | None = 60.0

    def __post_init__(self) -> None:
        check_int("max_num_seqs", self.max_num_seqs, 1, 1 << 16)
        check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 20)
        for name in ("max_model_len", "max_queue"):
            if (value := getattr(self, name)) is not None:
                check_int(name, value, 1, INT32_MAX)
        check_int("block_size", self.block_size, 16, 64)
        if self.block_size not in (16, 32, 64):
            raise ValueError(f"block_size must be 16, 32 or 64, got {self.block_size!r}")
        if self.kv_cache_memory_bytes is not None:
            check_int("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 1 << 50)
        if self.watchdog_s is not None:
            check_float("watchdog_s", self.watchdog_s, 1e-3, 1e6)
        check_float("gpu_memory_utilization", self.gpu_memory_utilization, 0.01, 1.0)
        for name in ("prefix_cache", "graph_cache", "enforce_eager", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool, got {getattr(self, name)!r}")
        for name, known in (("weight_check", WEIGHT_CHECKS), ("codegen", CODEGENS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if not isinstance(self.pack, bool) and self.pack != "auto":
            raise ValueError(f'pack must be True, False or "auto", got {self.pack!r}')
        if not isinstance(self.release_weights, bool):
            raise ValueError(f"release_weights must be a bool, got {self.release_weights!r}")
        if self.release_weights and self.pack is False:
            raise ValueError(
                'release_weights=True needs packed weights: pack must be True or "auto", got False'
            )
        if self.deterministic and self.codegen == "inductor":
            raise ValueError(
                "deterministic=True needs codegen 'direct' or 'auto': what Inductor writes depends "
                "on the shapes of the batch; got 'inductor'"
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
    """How one request is sampled. Names, defaults and order of work are vLLM's.

    Logits are changed in this order: allowed_token_ids, bad_words, min_tokens, logit_bias,
    penalties, temperature, min_p, top_k, top_p. With temperature 0 the best token is taken after
    the penalties.

    Attributes:
        n: Outputs per prompt, which share the prompt's blocks of the cache.
        max_tokens: Most tokens that are generated.
        min_tokens: No end token, stop token or stop string counts before so many tokens.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k most likely tokens; 0 or -1 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches top_p; 1 keeps all.
        min_p: Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        repetition_penalty: > 1 makes tokens of the prompt and the output less likely (positive
            logits are divided by it, negative ones multiplied).
        presence_penalty: Subtracted once from the logit of a token that was generated.
        frequency_penalty: Subtracted for each time that a token was generated.
        logit_bias: Token id -> number added to its logit.
        allowed_token_ids: Only these can be generated; None: all.
        bad_words: Strings (which need a tokenizer) or sequences of token ids that are never
            generated. A string is banned with and without a space before it.
        seed: Seed of the request's own generator (output i of n takes seed + i); None draws one
            from torch's default generator.
        stop: Strings that end the request; the text ends before the first of them.
        stop_token_ids: Tokens that end the request besides the model's end tokens.
        ignore_eos: Go on past the model's end tokens.
        include_stop_str_in_output: The text ends after the stop string instead.
        skip_special_tokens: Leave special tokens out of the text.
        logprobs: Return the raw log-probability of each generated token and of so many most
            likely ones, under the model itself; None: of none.
        processed_logprobs: The same under the distribution that the token was drawn from, after
            everything above. With temperature 0: after the penalties.
        prompt_logprobs: Raw ones of the tokens of the prompt.
    Raises: InvalidRequestError for a value out of range or of the wrong type.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    processed_logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        error = InvalidRequestError
        check_limit("n", self.n)
        check_limit("max_tokens", self.max_tokens)
        check_int("min_tokens", self.min_tokens, 0, self.max_tokens, error)
        check_float("temperature", self.temperature, 0.0, 1e6, error)
        check_int("top_k", self.top_k, -1, INT32_MAX, error)
        check_float("top_p", self.top_p, 0.0, 1.0, error)
        if self.top_p == 0.0:
            raise error("top_p must be > 0, got 0; for greedy decoding use temperature=0")
        check_float("min_p", self.min_p, 0.0, 1.0, error)
        check_float(
            "repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 1e6, error
        )
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0, error)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0, error)
        for name in ("logprobs", "processed_logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                check_limit(name, count)
        if self.seed is not None:
            check_int("seed", self.seed, 0, SEED_MAX, error)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise error(f"{name} must be a bool, got {getattr(self, name)!r}")
        if not isinstance(self.logit_bias, Mapping):
            raise error(f"logit_bias must be a dict of token ids, got {self.logit_bias!r}")
        check_length("logit_bias", self.logit_bias)
        for token_id, bias in self.logit_bias.items():
            check_int("each key of logit_bias", token_id, 0, INT32_MAX, error)
            check_limit("logit_bias[i]", bias)
        # Frozen, and not the caller's own objects.
        set_field = object.__setattr__
        set_field(self, "logit_bias", dict(self.logit_bias))
        set_field(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        check_length("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise error("allowed_token_ids must name at least one token, got none")
            set_field(self, "allowed_token_ids", allowed)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not _is_list(stop) or not all(isinstance(item, str) and item for item in stop):
            raise error(f"stop must be a str or a list of str, none empty, got {self.stop!r}")
        check_length("stop", stop)
        for item in stop:
            check_length("stop[i]", item)
        set_field(self, "stop", tuple(stop))
        set_field(self, "bad_words", _bad_words(self.bad_words))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _is_list(value: object) -> TypeGuard[Collection[Any]]:
    return isinstance(value, list | tuple | set | frozenset)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not _is_list(value):
        raise InvalidRequestError(f"{name} must be a list of ints, got {value!r}")
    for token_id in value:
        check_int(f"each of {name}", token_id, 0, INT32_MAX, InvalidRequestError)
    return tuple(value)


def _bad_words(value: object) -> tuple[str | tuple[int, ...], ...]:
    if not _is_list(value):
        raise InvalidRequestError(f"bad_words must be a list of words, got {value!r}")
    check_length("bad_words", value)
    words = []
    for word in value:
        if not isinstance(word, str):
            word = _token_ids("bad_words", word)
        if not word:
            raise InvalidRequestError("a bad word must not be empty")
        check_length("bad_words[i]", word)
        words.append(word)
    return tuple(words)
