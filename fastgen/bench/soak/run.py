"""The whole soak: coroutines, then threads, then each checked request alone; and the verdict."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ... import api
from ...async_engine import AsyncEngine
from ...engine.engine import EngineCore
from ...engine.kv_cache import block_bytes
from ...engine.request import Request
from ...histogram import Histogram
from ...outputs import EngineMetrics
from ..machine import peak_rss_bytes, reset_peak_rss
from .coroutines import serve_all
from .ledger import Ledger
from .orders import Order, make_order
from .samples import Watcher, block_faults
from .threads import serve_in_threads

BLOCK_SIZE = 16
IDLE_LIMIT_S = 30.0


@dataclass(frozen=True)
class Setting:
    """What is run.

    in_threads: Part of the requests that come from threads, after the others. num_checked: About
    so many requests are compared with a run alone. num_callers: Coroutines, each with a request.
    max_num_seqs, max_num_batched_tokens, max_queue, num_blocks: Of the engine: small, so that
    requests wait, are refused, preempted and chunked.
    """

    num_requests: int = 10_000
    seed: int = 0
    in_threads: float = 0.2
    num_threads: int = 8
    num_checked: int = 300
    num_callers: int = 160
    callers_per_loop: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 256
    max_queue: int = 104
    num_blocks: int = 192

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ValueError(f"there must be at least one request, got {self.num_requests}")


def soak(
    model: Any,
    tokenizer: Any,
    setting: Setting,
    progress: Callable[[int], None] = lambda num_ended: None,
) -> dict[str, Any]:
    """Run everything; "violations" in the result is empty if all was well.

    The engine is deterministic, so that a request's tokens are the same to the last bit alone.

    model: Not optimised; it is not afterwards. progress: Is told how many requests have ended.
    """
    reset_peak_rss()
    ledger = Ledger()
    requests_before = _num_requests_in_memory()
    engine = AsyncEngine(
        model,
        tokenizer,
        deterministic=True,
        block_size=BLOCK_SIZE,
        max_num_seqs=setting.max_num_seqs,
        max_num_batched_tokens=setting.max_num_batched_tokens,
        max_queue=setting.max_queue,
        kv_cache_memory_bytes=setting.num_blocks * _block_bytes(model),
    )
    core = api.require(model).engine()
    vocab_size = core.compiled.vocab_size
    longest = min(core.max_model_len, setting.num_blocks * BLOCK_SIZE)
    share = setting.num_checked / setting.num_requests

    def order(index: int) -> Order:
        return make_order(index, setting.seed, vocab_size, longest, share)

    in_coroutines = round(setting.num_requests * (1 - setting.in_threads))
    watcher = Watcher(core, ledger, setting.num_requests, progress)
    watcher.start()
    start = time.perf_counter()
    asyncio.run(serve_all(engine, map(order, range(in_coroutines)), ledger, setting.num_callers))
    rest = [order(index) for index in range(in_coroutines, setting.num_requests)]
    serve_in_threads(engine, rest, ledger, setting.num_threads, setting.callers_per_loop)
    _wait_idle(core, ledger)
    seconds = time.perf_counter() - start
    watcher.stop()
    metrics, memory, whole = core._snapshot(), watcher.memory(), 0
    if core.alive:
        _check_end(core, ledger, metrics, memory, setting, requests_before)
        whole = _compare_with_alone(engine, ledger, order)
    else:
        ledger.violation("the engine's thread has ended; its log says why")
    asyncio.run(engine.shutdown(drain=False))
    api.restore(model)
    return {
        "setting": asdict(setting),
        "seconds": seconds,
        "finished": metrics.finished,
        "by_conduct": {
            conduct.value: dict(sorted(reasons.items()))
            for conduct, reasons in ledger.reasons.items()
            if reasons
        },
        "cancelled_while": dict(ledger.cancelled_while),
        "given_up": ledger.num_unseen,
        "queue_full": ledger.num_refused,
        "compared": {"whole": whole, "cut": len(ledger.checked) - whole},
        "queue_time_ms": _quantiles(metrics.queue_time),
        "ttft_ms": _quantiles(metrics.ttft),
        "tpot_ms": _quantiles(metrics.tpot),
        "prompt_tokens": metrics.prompt_tokens,
        "output_tokens": metrics.output_tokens,
        "output_tokens_per_s": metrics.output_tokens / seconds,
        "engine_steps": metrics.engine_steps,
        "preemptions": metrics.preemptions,
        "prefix_cache_hit_rate": metrics.prefix_cache_hit_rate,
        "blocks": {
            "total": metrics.num_blocks,
            "most_used": watcher.max_used_blocks,
            "free_at_the_end": metrics.num_free_blocks,
            "samples": watcher.num_samples,
        },
        "memory": memory,
        "peak_rss_bytes": peak_rss_bytes(),
        "num_violations": ledger.num_violations,
        "violations": ledger.violations,
    }


def _wait_idle(core: EngineCore, ledger: Ledger) -> None:
    """Every caller has gone; what they have left behind is about to end."""
    deadline = time.monotonic() + IDLE_LIMIT_S
    while core.alive and not core.is_idle:
        if time.monotonic() > deadline:
            ledger.violation(f"requests are left {IDLE_LIMIT_S:g} s after their callers")
            return
        time.sleep(0.01)


def _check_end(
    core: EngineCore,
    ledger: Ledger,
    metrics: EngineMetrics,
    memory: dict[str, Any],
    setting: Setting,
    requests_before: int,
) -> None:
    """What must hold when no request is left."""
    if ledger.num_ended != setting.num_requests:
        ledger.violation(f"{ledger.num_ended} requests of {setting.num_requests} have ended")
    ledger.check_against(metrics.finished)
    if metrics.num_free_blocks != metrics.num_blocks:
        ledger.violation(f"{metrics.num_blocks - metrics.num_free_blocks} blocks are left")
    assert core._scheduler is not None, "nothing has run"
    for fault in core._mailbox.call(lambda: block_faults(core._scheduler)):  # pyright: ignore
        ledger.violation(fault)
    if core._sampling:
        ledger.violation(f"{len(core._sampling)} states of the sampler are left")
    if core._on_the_way:
        ledger.violation(f"{len(core._on_the_way)} submissions never reached the scheduler")
    gc.collect()
    left = _num_requests_in_memory() - requests_before
    if left > 0:  # those of before may go meanwhile
        ledger.violation(f"{left} requests are over and still in memory")
    if memory["is_flat"] is False:
        ledger.violation(
            f"memory grew from {memory['first_bytes']} to {memory['last_bytes']} bytes, by more "
            f"than {memory['allowed_bytes']}"
        )


def _compare_with_alone(engine: AsyncEngine, ledger: Ledger, order: Callable[[int], Order]) -> int:
    """Run each checked request again, alone and with no block of others; how many were whole."""
    num_whole = 0
    for index in sorted(ledger.checked):
        own = order(index)
        (alone,) = engine.engine.generate(
            [own.prompt], own.params, cache_salt=f"request {index} alone"
        )
        token_ids = [completion.token_ids for completion in alone.outputs]
        num_whole += ledger.compare(own, token_ids)
    return num_whole


def _block_bytes(model: Any) -> int:
    """Of the model's cache, which its graph says."""
    api.optimize(model)
    size = block_bytes(api.require(model).compiled.spec, BLOCK_SIZE)
    api.restore(model)
    return size


def _quantiles(times: Histogram) -> dict[str, float | None]:
    """Of seconds, in milliseconds."""
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    quantiles = {name: times.quantile(share) for name, share in shares.items()}
    return {name: None if value is None else value * 1e3 for name, value in quantiles.items()}


def _num_requests_in_memory() -> int:
    return sum(type(thing) is Request for thing in gc.get_objects())
