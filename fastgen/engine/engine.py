"""The engine: one thread that runs every step of one model's requests."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..compiled import CompiledForward
from ..config import SEED_MAX, Config
from ..errors import (
    CapacityError,
    EngineClosedError,
    FastgenError,
    QueueFullError,
    RequestFailedError,
)
from ..outputs import EngineMetrics
from ..passes import Variant
from . import thread
from .admission import check_request
from .block_pool import BlockPool
from .decode_graphs import CudaCapturer, DecodeGraphs
from .delivery import deliver
from .kv_cache import KVCache
from .mailbox import Mailbox
from .memory_plan import PoolSize
from .metrics import MetricsRecorder
from .one_shot import OneShot
from .out_of_memory import TokenBudget, is_out_of_memory
from .prefix_cache import root_digest
from .request import Request, RequestStatus
from .runner import Runner, smallest_covering
from .sampler import SamplingState
from .scheduler import Scheduler, SchedulerOutput
from .threads import release_openmp_team
from .variant_check import check_variant
from .watchdog import Watchdog

logger = logging.getLogger("fastgen")

_FEWEST_BLOCKS = 2  # of a cache: the null block and another


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
        self._recorder = MetricsRecorder()
        self._budget = TokenBudget(config.max_num_batched_tokens)
        self._waiting_for_idle: list[OneShot] = []
        self._is_paused = False
        self._queue_lock = threading.Lock()
        # Submitted, and not yet with the scheduler. Weak: who is interrupted before a submission is
        # posted leaves nothing here.
        self._on_the_way: weakref.WeakSet[_Submission] = weakref.WeakSet()
        self._mailbox = Mailbox()
        note = self._recorder.note
        self.watchdog = Watchdog(config.watchdog_s, lambda: note("watchdog_warnings"))
        self._closer = thread.start(self, self._mailbox, self.watchdog)

    # Called from any thread.

    @property
    def alive(self) -> bool:
        """Whether the engine thread runs: not after close, nor in a forked child."""
        return self._mailbox.thread is not None and self._mailbox.thread.is_alive()

    def check(self, request: Request) -> None:
        """Raise InvalidRequestError or CapacityError if the request could never run."""
        check_request(request, self.compiled.vocab_size, self.max_model_len)
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

    def submit_all(
        self, requests: list[Request], together: bool = False, may_be_refused: bool = False
    ) -> None:
        """Check requests and queue all or none.

        together: They must all fit at once. may_be_refused: max_queue of the Config counts.
        Raises: as `submit`, and QueueFullError.
        """
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
        with self._queue_lock:
            if may_be_refused:
                self.check_queue(len(requests))
            submission = _Submission(requests)
            self._on_the_way.add(submission)
            self._mailbox.post(lambda: self._admit(submission))
        release_openmp_team()  # the caller is about to wait

    def check_queue(self, num_more: int) -> None:
        """Whether so many more requests may wait.

        Raises: QueueFullError if they would be more than max_queue.
        """
        max_queue = self.config.max_queue
        if max_queue is None:
            return
        num_waiting = self._num_waiting + sum(len(s.requests) for s in tuple(self._on_the_way))
        if num_waiting + num_more > max_queue:
            self._recorder.note("queue_full")
            raise QueueFullError(
                f"{num_waiting} requests wait and {num_more} more are given; max_queue is "
                f"{max_queue}: try again later, or raise it"
            )

    def cancel_all(self, requests: Iterable[Request], wait: bool = True) -> None:
        """End requests wherever they are; their blocks are free when a waiting call returns.

        On the engine's own thread, where a garbage collection may end a stream that was forgotten
        in the middle of a step, nobody waits.
        """
        pending = [r for r in requests if r.status is not RequestStatus.FINISHED]
        if not pending:
            return

        def cancel() -> None:
            for request in pending:
                self._finish(request, "cancelled")

        wait = wait and threading.current_thread() is not self._mailbox.thread
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

    def metrics(self, wait: bool = True) -> EngineMetrics:
        """A snapshot of the counters, after the step that runs or, `wait=False`, at once.

        Raises: EngineClosedError.
        """
        if wait:
            return self._mailbox.call(self._snapshot)
        if self._mailbox.closed:
            raise EngineClosedError("the engine is closed; make a new one")
        return self._snapshot()

    def release_cache(self) -> None:
        """Give the KV cache back; the next request takes a new one.

        Raises: FastgenError while requests are running.
        """
        self._mailbox.call(lambda: self._release("release the KV cache"))

    def pause(self) -> None:
        """Run no step until `resume`; requests are taken and wait, and may be cancelled."""

        def pause() -> None:
            self._is_paused = True

        self._mailbox.call(pause)

    def resume(self) -> None:
        """Go on after `pause`."""

        def resume() -> None:
            self._is_paused = False

        self._mailbox.call(resume)

    def wait_idle(self) -> None:
        """Wait until no request is left. New ones must be kept away by the caller."""
        idle = OneShot()
        self._mailbox.post(lambda: self._waiting_for_idle.append(idle))
        idle.wait()

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
                self._mailbox.call(self.abandon)
            self._closer()

    # Called on the engine thread.

    @property
    def _num_waiting(self) -> int:
        scheduler = self._scheduler
        return 0 if scheduler is None else len(scheduler.waiting)

    def _num_usable_blocks(self) -> int:
        scheduler = self._scheduler
        if scheduler is not None:
            return scheduler.pool.num_usable
        return self._pool_size().num_blocks() - 1

    def _pool_size(self) -> PoolSize:
        return PoolSize(self.compiled, self.config, self.device, self.max_model_len, self.fills_gpu)

    def _admit(self, submission: _Submission) -> None:
        """Queue requests; what prevents it ends them."""
        with self._queue_lock:  # nobody counts them twice, or not at all
            self._on_the_way.discard(submission)
            self._queue(submission.requests)

    def _queue(self, requests: list[Request]) -> None:
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
                self._recorder.admitted(len(request.prompt_token_ids))
            self._scheduler.add(request)

    def _make_pool(self) -> None:
        if self._scheduler is None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # of this thread
            size = self._pool_size()
            cache = self._make_cache(size.num_blocks())
            num_blocks = cache.num_blocks
            graphs = None
            if size.buckets:
                graphs = DecodeGraphs(
                    self.compiled,
                    cache,
                    self.device,
                    size.buckets,
                    min(size.longest_table, num_blocks),
                    CudaCapturer(self.device),
                )
            self._runner = Runner(
                self.compiled, cache, self.device, graphs, self.variants, self._recorder.note
            )
            self._scheduler = Scheduler(
                BlockPool(num_blocks),
                block_size=self.config.block_size,
                max_num_seqs=self.config.max_num_seqs,
                max_num_batched_tokens=self._budget.tokens,
                stats=self._recorder.scheduler_stats,
            )

    def _make_cache(self, num_blocks: int) -> KVCache:
        """A cache of so many blocks, or of fewer where there is no memory for them."""
        while True:
            try:
                return KVCache(self.compiled.spec, num_blocks, self.config.block_size, self.device)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or num_blocks < 2 * _FEWEST_BLOCKS:
                    raise
            num_blocks //= 2
            logger.warning("no memory for the KV cache; it is made with %d blocks", num_blocks)

    def _release(self, purpose: str) -> None:
        if self._scheduler is not None and self._scheduler.has_requests:
            raise FastgenError(
                f"requests are running; wait for them or cancel them before you {purpose}"
            )
        self._scheduler = self._runner = None
        for forward in (self.compiled, *self.variants.values()):
            forward.release()

    def abandon(self, error: BaseException | None = None) -> None:
        scheduler = self._scheduler
        for request in (*scheduler.running, *scheduler.waiting) if scheduler else ():
            self._finish(request, "error" if error else "cancelled", error)
        self._release("close the engine")

    def step(self) -> bool:
        """Run the messages and one step; False if there was nothing to compute."""
        start = time.perf_counter()
        while (message := self._mailbox.take()) is not None:
            message()
        if self._scheduler is not None:
            for request in self._scheduler.expired():
                self._finish(request, "deadline")
        self._tell_idle()
        if self._scheduler is None or self._runner is None or self._is_paused:
            return False
        output = self._scheduler.schedule()
        try:
            self._runner.prepare_blocks(output, self.poison_freed_blocks)
            if not output.num_seqs:
                return False
            result = self._runner.run(output)
            self._scheduler.advance(output)
            delivered = deliver(output, result, self._sampling)
            for place, error in delivered.errors.items():
                self._finish(delivered.requests[place], "error", error)
            self._append_all(delivered.requests, delivered.token_ids)
        except Exception as error:
            if is_out_of_memory(error) and self._budget.shrink(output.num_tokens):
                self._step_in_parts(output, error)
                return True
            logger.exception("a step failed; its %d requests end", output.num_seqs)
            for item in output.scheduled:
                self._finish(item.request, "error", error)
            return True
        self._budget.ran()
        self._scheduler.max_num_batched_tokens = self._budget.tokens
        self._recorder.step(
            output.num_tokens,
            delivered.num_logits,
            seconds=time.perf_counter() - start,
            forward=self._runner.forward_seconds,
            sampling=delivered.seconds,
        )
        return True

    def _step_in_parts(self, output: SchedulerOutput, error: Exception) -> None:
        """Undo a step that found no memory; its requests wait, and smaller steps follow."""
        assert self._scheduler is not None
        self._recorder.note("out_of_memory_steps")
        logger.warning(
            "no memory for a step of %d tokens; its %d requests start over in steps of %d: %s",
            output.num_tokens,
            output.num_seqs,
            self._budget.tokens,
            error,
        )
        error.__traceback__ = None  # its frames hold what the step had computed
        self._scheduler.undo(output)
        self._scheduler.max_num_batched_tokens = self._budget.tokens
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps may be in pieces

    def forked(self) -> None:
        """In a forked child: the requests end here, and go on in the parent."""
        self._closer.detach()
        requests = [request for each in tuple(self._on_the_way) for request in each.requests]
        if self._scheduler is not None:
            requests += [*self._scheduler.running, *self._scheduler.waiting]
        self._mailbox.forked()
        self._queue_lock = threading.Lock()
        error = EngineClosedError("the process was forked: the request goes on in the parent")
        for request in requests:
            if request.status is not RequestStatus.FINISHED:
                request.end("error", error)
                request.done.set()

    def seconds_to_deadline(self) -> float | None:
        """How long a paused engine may wait; None: for ever."""
        deadline = None if self._scheduler is None else self._scheduler.next_deadline()
        return None if deadline is None else max(0.0, deadline - time.perf_counter())

    def _tell_idle(self) -> None:
        if self._waiting_for_idle and not (self._scheduler and self._scheduler.has_requests):
            for idle in self._waiting_for_idle:
                idle.set()
            self._waiting_for_idle.clear()

    def _append_all(self, requests: list[Request], token_ids: list[int]) -> None:
        """Add a token to each request that has not ended."""
        rest = range(len(requests))
        if self._scheduler is not None:
            rest = self._scheduler.append_tokens(requests, token_ids)
        one_by_one = set(rest)
        for place, request in enumerate(requests):
            if request.news.audience and place not in one_by_one:
                request.news.tell()
        for place in reversed(rest):  # of the running requests the last leaves with the least work
            self._append(requests[place], token_ids[place])

    def _append(self, request: Request, token_id: int) -> None:
        if request.status is RequestStatus.FINISHED:
            return
        assert self._scheduler is not None
        is_first = request.first_token_time is None
        try:
            reason = self._scheduler.append_token(request, token_id)
        except BaseException as error:  # of the tokenizer: a panic of Rust's is no Exception
            self._finish(request, "error", error)
            return
        finally:
            if is_first:
                self._recorder.first_token(request)
        if reason is not None:
            self._ended(request)
        elif request.news.audience:
            request.news.tell()

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
        self._recorder.finished(request)
        request.done.set()
        if request.news.audience:
            request.news.tell()
        if request.group is not None:
            request.group.fail(failure(request))

    def _snapshot(self) -> EngineMetrics:
        runner = self._runner
        return self._recorder.snapshot(self._scheduler, runner and runner.graphs)


@dataclass(eq=False)
class _Submission:
    requests: list[Request]


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
