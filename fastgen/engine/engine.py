"""The engine: one thread that runs every step of one model's requests."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from ..compiled import CompiledForward, ForwardOutput
from ..config import SEED_MAX, Config, check_int
from ..errors import (
    CapacityError,
    EngineClosedError,
    FastgenError,
    InvalidRequestError,
    RequestFailedError,
)
from ..outputs import EngineMetrics
from ..passes import Variant
from .block_pool import BlockPool
from .decode_graphs import CudaCapturer, DecodeGraphs, batch_buckets
from .kv_cache import KVCache, block_bytes, free_memory_bytes
from .logprobs import logprobs_of
from .mailbox import Mailbox
from .memory_plan import GpuMemory, MemoryPlan, plan_memory
from .prefix_cache import root_digest
from .request import Request, RequestStatus
from .runner import Runner, smallest_covering
from .sampler import SamplingState, sample
from .scheduler import ScheduledRequest, Scheduler, SchedulerOutput, SchedulerStats
from .threads import release_openmp_team
from .variant_check import check_variant

logger = logging.getLogger("fastgen")


class EngineCore:
    """Requests in, tokens out. Public methods may be called from any thread.

    The scheduler, the pool and the runner belong to the engine thread; others reach them by
    messages. The thread holds the engine only while it works, so that a forgotten engine goes
    away with its memory.
    """

    def __init__(
        self,
        compiled: CompiledForward,
        config: Config,
        device: torch.device,
        max_model_len: int,
    ) -> None:
        self.compiled, self.config, self.device = compiled, config, device
        self.max_model_len = max_model_len
        self.variants: dict[Variant, CompiledForward] = {}
        self.epoch = 0
        self.poison_freed_blocks = False  # set by tests: whoever reads a freed block sees NaN
        self.fills_gpu = False  # an explicit Engine may fill the GPU as gpu_memory_utilization says
        self._scheduler: Scheduler | None = None
        self._runner: Runner | None = None
        self._sampling: dict[int, SamplingState] = {}
        self._counters = dict.fromkeys(
            ("engine_steps", "computed_tokens", "prompt_tokens", "output_tokens"), 0
        )
        self._stats = SchedulerStats()
        self._waiting_for_idle: list[Future] = []
        self._forward_seconds = self._sampling_seconds = self._host_seconds = 0.0
        self._first_step_seconds = 0.0
        self._mailbox = Mailbox()
        thread = threading.Thread(
            target=_run_engine,
            args=(weakref.ref(self), self._mailbox),
            name="fastgen-engine",
            daemon=True,
        )
        self._mailbox.thread = thread
        self._closer = weakref.finalize(self, self._mailbox.close)
        thread.start()

    # Called from any thread.

    @property
    def alive(self) -> bool:
        """Whether the engine thread runs: not after close, nor in a forked child."""
        return self._mailbox.thread is not None and self._mailbox.thread.is_alive()

    def check(self, request: Request) -> None:
        """Raise InvalidRequestError or CapacityError if the request could never run."""
        prompt = request.prompt_token_ids
        if not prompt and request.query_token_id is None:
            raise InvalidRequestError("a prompt must hold at least one token, got none")
        largest = self.compiled.vocab_size - 1
        for token_id in prompt:
            if type(token_id) is not int or not 0 <= token_id <= largest:
                check_int("each prompt token id", token_id, 0, largest, InvalidRequestError)
        params = request.sampling
        for name, token_ids in (
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
            ("bad_words", itertools.chain(*request.bad_words)),
        ):
            for token_id in token_ids:
                check_int(f"each token id of {name}", token_id, 0, largest, InvalidRequestError)
        length, max_tokens = len(prompt), params.max_tokens
        if length + max_tokens > self.max_model_len:
            raise CapacityError(
                f"prompt ({length}) + max_tokens ({max_tokens}) must be <= max_model_len "
                f"({self.max_model_len}); shorten one of them"
            )
        if not self.fits([request]):
            slots = self._num_usable_blocks() * self.config.block_size
            raise CapacityError(
                f"the KV cache pool holds {slots} tokens, the request needs "
                f"{request.max_num_tokens}; raise kv_cache_memory_bytes or ask for fewer tokens"
            )

    def fits(self, requests: Iterable[Request]) -> bool:
        """Whether these requests can be in the pool together at their full length."""
        size = self.config.block_size
        needed = sum(-(-request.max_num_tokens // size) for request in requests)
        return needed <= self._num_usable_blocks()

    def submit(self, request: Request) -> None:
        """Check a request and queue it.

        Raises: InvalidRequestError, CapacityError, EngineClosedError.
        """
        self.submit_all([request])

    def submit_all(self, requests: list[Request], together: bool = False) -> None:
        """Check requests and queue all or none; `together`: they must all fit at once."""
        for request in requests:
            if request.index == 0:  # its siblings ask for the same
                self.check(request)
        if together and not (self.fits(requests) and len(requests) <= self.config.max_num_seqs):
            raise CapacityError(
                f"{len(requests)} rows must run together, and the KV cache pool "
                f"({self._num_usable_blocks()} blocks of {self.config.block_size}) or max_num_seqs "
                f"({self.config.max_num_seqs}) does not allow it"
            )
        for request in requests:
            seed = request.sampling.seed
            if seed is not None:
                request.seed = (seed + request.index) % (SEED_MAX + 1)
            elif not request.sampling.greedy and request.group is None:
                request.seed = int(torch.randint(SEED_MAX, ()))  # as torch.manual_seed governs
        self._mailbox.post(lambda: self._admit(requests))
        release_openmp_team()  # the caller is about to wait

    def cancel_all(self, requests: Iterable[Request], wait: bool = True) -> None:
        """End requests wherever they are; their blocks are free when a waiting call returns."""
        pending = [r for r in requests if r.status is not RequestStatus.FINISHED]
        if not pending:
            return

        def cancel() -> None:
            for request in pending:
                self._finish(request, "cancelled")

        (self._mailbox.call if wait else self._mailbox.post)(cancel)

    def feed(
        self, requests: list[Request], token_ids: list[int], parents: list[int] | None = None
    ) -> None:
        """Append tokens that were chosen outside the engine, one to each request.

        parents: Request i goes on from request parents[i] first; None: each from itself.
        """

        def feed() -> None:
            if parents is not None and self._scheduler is not None:
                self._scheduler.fork(requests, parents)
            self._append_all(requests, token_ids)

        self._mailbox.post(feed)

    def read_caches(self, requests: list[Request]) -> list[list[tuple[torch.Tensor, ...]]]:
        """Copies of the keys and values of requests that wait for their next token, per layer.

        A request that was preempted meanwhile is computed again first.
        """

        def read() -> list[list[tuple[torch.Tensor, ...]]] | None:
            if any(request.num_computed_tokens < request.num_tokens for request in requests):
                return None
            assert self._runner is not None
            return [
                self._runner.read_cache(request.block_ids, request.num_computed_tokens)
                for request in requests
            ]

        while (caches := self._mailbox.call(read)) is None:
            time.sleep(0.001)
        return caches

    def metrics(self) -> EngineMetrics:
        """A snapshot of the counters."""
        return self._mailbox.call(self._snapshot)

    def release_cache(self) -> None:
        """Give the KV cache back; the next request takes a new one.

        Raises: FastgenError while requests are running.
        """
        self._mailbox.call(lambda: self._release("release the KV cache"))

    def wait_idle(self) -> None:
        """Wait until no request is left. New ones must be kept away by the caller."""
        idle: Future = Future()
        self._mailbox.post(lambda: self._waiting_for_idle.append(idle))
        idle.result()

    def replace(self, compiled: CompiledForward, device: torch.device, max_model_len: int) -> None:
        """Go on with another graph, without variants, after all requests of the old one."""

        def replace() -> None:
            self._release("change the model")
            self.compiled, self.device, self.max_model_len = compiled, device, max_model_len
            self.variants.clear()

        self.wait_idle()
        self._mailbox.call(replace)

    def check_variant(self, forward: CompiledForward) -> None:
        """Compare another forward of the model with the plain one, on the engine's thread.

        Raises: UnsupportedModelError if it computes something else.
        """
        size = self.config.block_size
        self._mailbox.call(lambda: check_variant(self.compiled, forward, size, self.device))

    def add_variant(self, forward: CompiledForward) -> None:
        """Run requests that need what this forward takes and gives, over the same KV cache.

        For two that are added, what takes and gives all that both do must be added, too.
        """
        assert forward.spec == self.compiled.spec, "a variant needs another KV cache"
        self._mailbox.call(lambda: self.variants.update({forward.variant: forward}))

    def forward_with(self, variant: Variant) -> CompiledForward | None:
        """The forward that runs requests that need `variant`, or None."""
        known = dict(self.variants)  # the engine's thread may change it
        return smallest_covering(self.compiled, known, variant)

    def begin_epoch(self, epoch: int) -> None:
        """The weights have changed: no block that was computed before is found any more.

        Requests that run go on, and what they compute is found by nobody.
        """

        def begin() -> None:
            self.epoch = epoch
            if self._scheduler is not None:
                self._scheduler.pool.forget_all()

        self._mailbox.call(begin)

    @property
    def is_idle(self) -> bool:
        """Whether no request is queued or running; may be out of date when it is read."""
        scheduler = self._scheduler
        return scheduler is None or not scheduler.has_requests

    def close(self) -> None:
        """End all requests and the thread; later calls raise EngineClosedError."""
        if self._closer.alive:
            with contextlib.suppress(EngineClosedError):  # the thread is gone, and told everybody
                self._mailbox.call(self._abandon)
            self._closer()

    # Called on the engine thread.

    def _num_usable_blocks(self) -> int:
        scheduler = self._scheduler
        if scheduler is not None:
            return scheduler.pool.num_usable
        return self._pool_blocks() - 1

    def _pool_blocks(self) -> int:
        """Blocks of a new pool: what max_num_seqs can need, at most the memory it may take."""
        per_block = block_bytes(self.compiled.spec, self.config.block_size)
        allowed = self.config.kv_cache_memory_bytes
        if allowed is None and self.device.type == "cuda" and self.fills_gpu:
            allowed = self._plan_gpu_memory().cache
        elif allowed is None:
            allowed = free_memory_bytes(self.device) // 2
        needed = self.config.max_num_seqs * self._longest_table() + 1
        return max(2, min(needed, allowed // per_block))

    def _longest_table(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.config.block_size)

    def _buckets(self) -> tuple[int, ...]:
        """Numbers of sequences whose decode steps are captured."""
        eager = self.device.type != "cuda" or self.config.enforce_eager
        return () if eager else batch_buckets(self.config.max_num_seqs)

    def _plan_gpu_memory(self) -> MemoryPlan:
        return plan_memory(
            GpuMemory.of(self.device),
            self.compiled,
            self.config.gpu_memory_utilization,
            self.config.max_num_batched_tokens,
            self._buckets(),
            self._longest_table(),
        )

    def _admit(self, requests: list[Request]) -> None:
        """Queue requests; what prevents it ends them."""
        try:
            self._make_pool()
        except (MemoryError, RuntimeError) as error:
            for request in requests:
                self._finish(request, "error", error)
            return
        assert self._scheduler is not None
        for request in requests:
            if request.status is RequestStatus.FINISHED:
                continue  # cancelled on the way here
            if not self._scheduler.fits([request]):  # less memory was free than when it was checked
                self._finish(request, "error", CapacityError("the KV cache pool is too small"))
                continue
            needs = Variant(request.prompt_embeds is not None, request.wants_hidden_states)
            if self.forward_with(needs) is None:
                why = f"the engine has no graph with {needs}: its model was changed meanwhile"
                self._finish(request, "error", FastgenError(why))
                continue
            if request.group is None:
                self._sampling[request.request_id] = SamplingState(request)
            if self.config.prefix_cache and request.prompt_embeds is None:
                request.cache_root = root_digest(
                    self.epoch, self.compiled.graph_id, request.cache_salt
                )
            if not request.needs_fork:
                self._counters["prompt_tokens"] += len(request.prompt_token_ids)
            self._scheduler.add(request)

    def _make_pool(self) -> None:
        if self._scheduler is None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # of this thread
            num_blocks = self._pool_blocks()
            cache = KVCache(self.compiled.spec, num_blocks, self.config.block_size, self.device)
            graphs = None
            if buckets := self._buckets():
                width = min(self._longest_table(), num_blocks)
                capturer = CudaCapturer(self.device)
                graphs = DecodeGraphs(self.compiled, cache, self.device, buckets, width, capturer)
            self._runner = Runner(self.compiled, cache, self.device, graphs, self.variants)
            self._scheduler = Scheduler(
                BlockPool(num_blocks),
                block_size=self.config.block_size,
                max_num_seqs=self.config.max_num_seqs,
                max_num_batched_tokens=self.config.max_num_batched_tokens,
                stats=self._stats,
            )

    def _release(self, purpose: str) -> None:
        if self._scheduler is not None and self._scheduler.has_requests:
            raise FastgenError(
                f"requests are running; wait for them or cancel them before you {purpose}"
            )
        self._scheduler = self._runner = None
        for forward in (self.compiled, *self.variants.values()):
            forward.release()

    def _abandon(self, error: BaseException | None = None) -> None:
        scheduler = self._scheduler
        for request in (*scheduler.running, *scheduler.waiting) if scheduler else ():
            self._finish(request, "error" if error else "cancelled", error)
        self._release("close the engine")

    def _step(self) -> bool:
        """Run the messages and one step; False if there was nothing to compute."""
        start = time.perf_counter()
        while (message := self._mailbox.take()) is not None:
            message()
        self._tell_idle()
        if self._scheduler is None or self._runner is None:
            return False
        output = self._scheduler.schedule()
        try:
            self._runner.prepare_blocks(output, self.poison_freed_blocks)
            if not output.num_seqs:
                return False
            result = self._runner.run(output)
            self._scheduler.advance(output)
            self._counters["engine_steps"] += 1
            self._counters["computed_tokens"] += output.num_tokens
            sampling = self._deliver(output, result)
        except Exception as error:
            logger.exception("a step failed; its %d requests end", output.num_seqs)
            for item in output.scheduled:
                self._finish(item.request, "error", error)
            return True
        forward, took = self._runner.forward_seconds, time.perf_counter() - start
        self._forward_seconds += forward
        self._sampling_seconds += sampling
        self._host_seconds += took - forward - sampling
        self._first_step_seconds = self._first_step_seconds or took
        return True

    def _tell_idle(self) -> None:
        if self._waiting_for_idle and not (self._scheduler and self._scheduler.has_requests):
            for idle in self._waiting_for_idle:
                idle.set_result(None)
            self._waiting_for_idle.clear()

    def _deliver(self, output: SchedulerOutput, result: ForwardOutput) -> float:
        """Hand each request's logits to its lockstep group or to the sampler.

        Returns: seconds of the sampler.
        """
        if result.hidden_states:
            _deliver_hidden_states(output, result.hidden_states)
        logits = result.logits
        rows: list[int] = []
        requests: list[Request] = []
        for row, request in enumerate(output.decodes.requests):
            if request.group is None:
                rows.append(row)
                requests.append(request)
            else:
                request.group.offer(request, logits[row])
        end, num_sampled = len(output.decodes), len(output.decodes)
        for item in output.items:
            start, end = end, end + item.num_logits
            if item.all_logits:
                self._note_prompt_logprobs(item, logits[start:end])
            if not item.samples:
                continue
            num_sampled += 1
            if item.request.group is not None:
                item.request.group.offer(item.request, logits[end - 1])
            else:
                rows.append(end - 1)
                requests.append(item.request)
        self._counters["output_tokens"] += num_sampled
        if not rows:
            return 0.0
        before = time.perf_counter()
        states = [self._sampling[request.request_id] for request in requests]
        sampled = sample(logits if len(rows) == len(logits) else logits[rows], states)
        after = time.perf_counter()
        for row, error in sampled.errors.items():
            self._finish(requests[row], "error", error)
        for row, logprobs in sampled.logprobs.items():
            if row not in sampled.errors:
                requests[row].logprobs.append(logprobs)
        for row, logprobs in sampled.processed_logprobs.items():
            requests[row].processed_logprobs.append(logprobs)
        self._append_all(requests, sampled.token_ids)
        return after - before

    def _note_prompt_logprobs(self, item: ScheduledRequest, logits: torch.Tensor) -> None:
        """Row i of the logits says how likely token start + i + 1 was."""
        request, prompt = item.request, item.request.prompt_token_ids
        known = request.prompt_logprobs
        assert known is not None
        if not known:
            known.append(None)  # nothing comes before the first token
        # After a preemption some are known already.
        first, last = len(known), min(item.start + item.num_tokens, len(prompt) - 1)
        if first <= last:
            targets = prompt[first : last + 1]
            rows = logits[first - item.start - 1 : last - item.start]
            known.extend(logprobs_of(rows, targets, request.sampling.prompt_logprobs or 0))

    def _append_all(self, requests: list[Request], token_ids: list[int]) -> None:
        """Add a token to each request that has not ended."""
        rest = range(len(requests))
        if self._scheduler is not None:
            rest = self._scheduler.append_tokens(requests, token_ids)
        one_by_one = set(rest)
        for place, request in enumerate(requests):
            if request.stream and place not in one_by_one:
                request.events.put(("token", token_ids[place], request.index))
        for place in reversed(rest):  # of the running requests the last leaves with the least work
            self._append(requests[place], token_ids[place])

    def _append(self, request: Request, token_id: int) -> None:
        if request.status is RequestStatus.FINISHED:
            return
        assert self._scheduler is not None
        try:
            reason = self._scheduler.append_token(request, token_id)
        except BaseException as error:  # of the tokenizer: a panic of Rust's is no Exception
            self._finish(request, "error", error)
            return
        if request.stream:
            request.events.put(("token", token_id, request.index))
        if reason is not None:
            self._ended(request)

    def _finish(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        if request.status is RequestStatus.FINISHED:
            return
        if self._scheduler is None or request.status is RequestStatus.NEW:
            request.end(reason, error)  # it was never queued
        else:
            self._scheduler.finish(request, reason, error)
        self._ended(request)

    def _ended(self, request: Request) -> None:
        self._sampling.pop(request.request_id, None)
        request.events.put(("finish", request.finish_reason, request.index))
        request.done.set()
        if request.group is not None:
            request.group.fail(failure(request))

    def _snapshot(self) -> EngineMetrics:
        scheduler = self._scheduler
        now: dict[str, Any] = {}
        if scheduler is not None:
            pool = scheduler.pool
            now = {
                "num_running": len(scheduler.running),
                "num_waiting": len(scheduler.waiting),
                "num_blocks": pool.num_usable,
                "num_free_blocks": pool.num_free,
                "num_cached_blocks": pool.num_cached,
                "cache_usage": pool.num_used / pool.num_usable,
            }
        graphs = None if self._runner is None else self._runner.graphs
        if graphs is not None:
            now["captured_graphs"] = graphs.num_captured
            now["replayed_steps"] = graphs.num_replayed
            now["capture_refusal"] = graphs.refusal
        return EngineMetrics(
            **self._counters,
            **now,
            finished=dict(self._stats.finished),
            preemptions=self._stats.preemptions,
            prefix_tokens=self._stats.prefix_tokens,
            prefix_cache_hit_tokens=self._stats.prefix_hit_tokens,
            cache_waste=self._stats.cache_waste,
            forks=self._stats.forks,
            block_copies=self._stats.block_copies,
            forward_seconds=self._forward_seconds,
            sampling_seconds=self._sampling_seconds,
            host_seconds=self._host_seconds,
            first_step_seconds=self._first_step_seconds,
        )


def _deliver_hidden_states(output: SchedulerOutput, states: Sequence[torch.Tensor]) -> None:
    """Hand hidden states to the groups that want them, before the logits that follow them."""
    place = 0
    for item in output.scheduled:
        request = item.request
        if request.wants_hidden_states and request.group is not None:
            request.group.note_hidden_states(request, item.start, states, place, item.num_tokens)
        place += item.num_tokens


def failure(request: Request, error: BaseException | None = None) -> FastgenError:
    """The error a caller sees for a request that did not come to its own end.

    error: What went wrong, if it is not the request's own error.
    """
    cause = error or request.error
    if cause is None:
        return EngineClosedError(
            f"request {request.request_id} was cancelled: its engine was closed, or its model "
            "restored, while it ran"
        )
    failed = RequestFailedError(
        f"request {request.request_id} failed: {type(cause).__name__}: {cause}"
    )
    failed.__cause__ = cause
    return failed


def _run_engine(reference: Callable[[], Any], mailbox: Mailbox) -> None:
    """The engine thread: works while there is work, waits without holding the engine."""
    while mailbox.wait(on_idle=release_openmp_team):
        engine: EngineCore | None = reference()
        if engine is None:
            return
        try:
            while engine._step() and not mailbox.closed:
                pass
        except BaseException as error:
            logger.exception("the engine stopped")
            mailbox.close(join=False)
            while (message := mailbox.take()) is not None:  # who waits for an answer gets one
                with contextlib.suppress(BaseException):
                    message()
            engine._abandon(error)
            return
        del engine
