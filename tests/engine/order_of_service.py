"""Who must be served before whom, watched from outside a scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgen.engine.request import Request, RequestStatus

if TYPE_CHECKING:
    from simulation import Simulation

    from fastgen.engine.scheduler import SchedulerOutput

WAITS = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class OrderOfService:
    """Rules for each step, from which follows that every request ends.

    The first, which is the request with the smallest key, ends within a number of steps. While it
    waits, nobody is let in, and who runs and is preempted does not come back; once it runs, only
    those that ran already can spend the budget before it. Each of them has at most `stay_work`
    steps with something to run, and of those in which something runs at all one of them is served
    or the first itself. So the first ends after at most as many such steps as all of their
    `stay_work` and its own, unless it waits for its caller.

    Keys never change. A request becomes the first when those with smaller keys have ended; they
    are finitely many, because keys grow with time. With R rows of at most W steps each, a request
    that has n smaller keys before it ends within (n + 1) * R * W steps.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._first: Request | None = None
        self._steps_left = self._num_preemptions = self._num_admitted = 0
        self._ready: list[Request] = []  # those whose prompts are computed, unless there are forks
        self.is_disturbed = False

    def forget(self) -> None:
        """Somebody else has taken blocks away: count anew."""
        self._first, self.is_disturbed = None, True

    def before(self) -> None:
        """Note how things are before a step is scheduled."""
        scheduler = self._simulation.scheduler
        candidates = [*scheduler.running]
        if (waiting := scheduler.waiting.first()) is not None:
            candidates.append(waiting)
        first = min(candidates, key=lambda request: request.service_key, default=None)
        if first is not self._first:
            self._first = first
            others = {*scheduler.running} - {first}
            self._steps_left = sum(map(stay_work, others)) + (stay_work(first) if first else 0)
        if first is not None:
            self._num_preemptions = first.num_preemptions
        self._num_admitted = scheduler._num_admitted
        self._ready = []
        if not any(request.group for request in scheduler.running):
            self._ready = [request for request in scheduler.running if _has_one_token(request)]

    def after(self, output: SchedulerOutput, scheduled: set[Request]) -> None:
        """Check what was scheduled."""
        scheduler, first = self._simulation.scheduler, self._first
        new = [r for r in scheduler.running if r.admission_order >= self._num_admitted]
        next_waiting = scheduler.waiting.first()
        if new and next_waiting is not None:
            last = max(request.service_key for request in new)
            assert last < next_waiting.service_key, "a request was passed over"
        if first is not None:
            assert first.num_preemptions == self._num_preemptions, "the first lost its blocks"
            if not (first in self._simulation.late and _has_caught_up(first)):
                assert scheduled, "no progress"
                assert first in scheduled or self._may_wait(first, output), "the first waited"
                self._steps_left -= 1
                assert self._steps_left >= 0, "the first starves"
        if len(self._ready) <= scheduler.max_num_batched_tokens:
            for request in self._ready:
                assert request in scheduled or request.status in WAITS, "a prompt came before it"

    def _may_wait(self, first: Request, output: SchedulerOutput) -> bool:
        if first.status in WAITS:
            return True
        return output.num_tokens == self._simulation.scheduler.max_num_batched_tokens


def stay_work(request: Request) -> int:
    """Steps in which a request has something to run from when it is let in until it leaves.

    Each token once and a query. A forked row may go on from one that lost its blocks, each time
    it gets a token.
    """
    work = request.max_num_tokens + 1
    return work if request.group is None else work * request.sampling.max_tokens


def _has_caught_up(request: Request) -> bool:
    """Whether it has nothing to run before it gets a token, or a row to go on from."""
    has_all = request.num_computed_tokens == request.num_tokens
    idle = has_all and not request.needs_query and not request.last_is_cached
    return request.status is RequestStatus.RUNNING and (request.needs_fork or idle)


def _has_one_token(request: Request) -> bool:
    missing = request.num_tokens - request.num_computed_tokens
    return missing == 1 and bool(request.output_token_ids)
