"""Who is served before whom: priorities that age, victims, deadlines, groups that wait."""

from __future__ import annotations

import random

import pytest
from fork_simulation import ForkSimulation
from lives import Lives
from simulation import Simulation

from fastgen.engine.request import Request, RequestStatus
from fastgen.engine.scheduler import PRIORITY_SECONDS, Scheduler


def served(simulation: Simulation) -> list[Request]:
    """All requests in the order in which they are first let in."""
    simulation.run_to_end()
    simulation.check_outputs()
    return sorted(simulation.requests, key=lambda request: request.scheduled_time or 0)


def one_at_a_time(**limits) -> Simulation:
    return Simulation(num_blocks=9, max_num_seqs=1, **limits)


def test_equal_priorities_are_served_in_order_of_arrival():
    simulation = one_at_a_time()
    requests = [simulation.add(3, 2, priority=3) for _ in range(5)]
    assert served(simulation) == requests


def test_lower_priorities_are_served_first():
    simulation = one_at_a_time()
    running = simulation.add(3, 2)
    simulation.step()
    low, middle, high = (simulation.add(3, 2, priority=level) for level in (2, 1, -3))
    assert served(simulation) == [running, high, middle, low]


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize(("seconds", "waits_longer_enough"), [(-0.5, False), (0.5, True)])
def test_a_level_is_worth_so_many_seconds(levels, seconds, waits_longer_enough):
    simulation = one_at_a_time()
    less_urgent = simulation.add(3, 2, priority=levels)
    simulation.now += levels * PRIORITY_SECONDS + seconds
    urgent = simulation.add(3, 2)
    first = less_urgent if waits_longer_enough else urgent
    assert served(simulation)[0] is first


def test_endless_urgent_requests_starve_nobody():
    """One comes in every step and lasts for two; what is less urgent is served in its time."""
    simulation = one_at_a_time()
    patient = simulation.add(3, 2, priority=2)
    while patient.scheduled_time is None:
        simulation.add(3, 2)
        simulation.step()
        for request in simulation.requests:
            if request.service_key > patient.service_key:
                assert request.scheduled_time is None
    # Two steps for each that came within the levels' time before it.
    assert simulation.now <= 2 * (2 * PRIORITY_SECONDS + 1)


def test_who_runs_is_not_disturbed_by_who_comes():
    simulation = Simulation(num_blocks=20, max_num_seqs=2, max_num_batched_tokens=100)
    running = [simulation.add(3, 9) for _ in range(2)]
    simulation.step()
    urgent = simulation.add(3, 2, priority=-5)
    for _ in range(7):
        assert [item.request for item in simulation.step().scheduled] == running
    assert urgent.status is RequestStatus.WAITING


def test_the_victim_is_the_one_with_the_largest_key_and_not_the_last_let_in():
    simulation = Simulation(num_blocks=5, block_size=4, max_num_batched_tokens=100)
    less_urgent = simulation.add(7, 8, priority=1)
    simulation.step()
    urgent = simulation.add(7, 8)
    while not less_urgent.num_preemptions:
        output = simulation.step()
    assert [item.request for item in output.scheduled] == [urgent]
    assert urgent.num_preemptions == 0
    simulation.run_to_end()
    simulation.check_outputs()


def test_the_row_of_a_victim_that_stands_before_others_goes():
    """Three run; the first row's request gives its blocks up, the others move up and go on."""
    simulation = Simulation(num_blocks=8, block_size=4, max_num_batched_tokens=100)
    victim, *others = (simulation.add(6, 11, priority=level) for level in (2, 1, 0))
    while not victim.num_preemptions:
        output = simulation.step()
    assert simulation.scheduler.running == output.decodes.requests
    assert set(output.decodes.requests) == set(others)
    simulation.run_to_end()
    simulation.check_outputs()


def test_a_prompt_in_chunks_does_not_hold_the_others_tokens_back():
    """Of the budget of 8 the running requests get theirs first, in every step."""
    simulation = Simulation(num_blocks=60, max_num_batched_tokens=8)
    running = [simulation.add(2, 30) for _ in range(3)]
    simulation.step()
    prompt = simulation.add(40, 5, priority=-3)
    for _ in range(8):
        items = simulation.step().scheduled
        assert [(item.request, item.num_tokens) for item in items] == [
            *((request, 1) for request in running),
            (prompt, 5),
        ]
    assert prompt.first_token_time is not None


# Deadlines.


def test_expired_requests_come_once_in_order_of_their_deadlines():
    simulation = Simulation(num_blocks=20, max_num_seqs=1)
    scheduler = simulation.scheduler
    late, soon, never, sooner = (simulation.add(3, 5, deadline=t) for t in (9.0, 5.0, None, 4.0))
    assert scheduler.next_deadline() == 4.0
    assert scheduler.expired(3.9) == []
    assert scheduler.expired(5.0) == [sooner, soon]
    assert scheduler.expired(5.0) == []
    assert scheduler.next_deadline() == 9.0
    scheduler.finish(late, "cancelled")
    assert scheduler.next_deadline() is None
    assert scheduler.expired(100.0) == []
    assert never.finish_reason is None


def test_expired_reads_the_clock():
    simulation = Simulation(num_blocks=20)
    request = simulation.add(3, 5, deadline=2.0)
    assert simulation.scheduler.expired() == []
    simulation.now = 2.0
    assert simulation.scheduler.expired() == [request]


@pytest.mark.parametrize("status", ["waiting", "running", "preempted"])
def test_a_deadline_passes_in_any_state(status):
    simulation = Simulation(num_blocks=5, block_size=4, max_num_batched_tokens=100)
    simulation.add(7, 9)
    request = simulation.add(7, 9, deadline=50.0)
    while request.status.value != status:
        simulation.step()
    simulation.now = 50.0
    assert simulation.expire() == [request]
    assert (request.finish_reason, request.block_ids) == ("deadline", [])
    simulation.run_to_end()
    simulation.check_outputs()


# A step that is taken back.


def test_a_step_that_failed_runs_again_with_nothing_lost():
    simulation = Simulation(num_blocks=30, max_num_batched_tokens=100)
    salt = {"salt": b"one", "rng": random.Random(1)}
    first, second = simulation.add(9, 5, **salt), simulation.add(6, 5, **salt)
    simulation.step()
    output = [list(request.output_token_ids) for request in (first, second)]
    simulation.undo_step()
    assert [request.status.value for request in (first, second)] == ["preempted"] * 2
    assert simulation.scheduler.pool.num_used == 0
    assert [list(request.output_token_ids) for request in (first, second)] == output
    simulation.run_to_end()
    simulation.check_outputs()


def test_blocks_that_a_failed_step_was_to_fill_are_not_found():
    simulation = Simulation(num_blocks=30, max_num_batched_tokens=100)
    for _ in range(2):  # both in one step: the second shares what the first will write
        simulation.add(9, 5, salt=b"one", rng=random.Random(1))
    simulation.undo_step()
    assert simulation.scheduler.pool.num_cached == 0
    simulation.run_to_end()
    simulation.check_outputs()


# Groups.


def test_a_group_that_is_half_let_in_gives_way():
    """The rows of two groups have taken one seat each, and each waits for its other row."""
    simulation = ForkSimulation(
        random.Random(0), num_blocks=40, max_num_seqs=2, max_num_batched_tokens=8
    )
    patient = simulation.add_group(2, 1, 12, 3, priority=1)
    simulation.step()
    assert patient is not None
    assert [row.status.value for row in patient.rows] == ["running", "waiting"]
    urgent = simulation.add_group(2, 1, 12, 3)
    assert urgent is not None
    simulation.run_to_end()
    simulation.check_outputs()
    assert sum(row.num_preemptions for row in patient.rows) > 0
    assert sum(row.num_preemptions for row in urgent.rows) == 0


def test_the_keys_of_a_group_follow_one_another():
    """Also if the clock goes on between its rows, and others are as urgent by their age."""
    simulation = ForkSimulation(random.Random(0), num_blocks=40)
    scheduler = simulation.scheduler
    ticks = iter(range(1000))
    scheduler.clock = lambda: PRIORITY_SECONDS * next(ticks) / 2
    groups = [simulation.add_group(2, 1, 3, 3, priority=level) for level in (1, 0, 1, 0)]
    waiting = [request.group for request in scheduler.waiting]
    assert waiting == [group for group in waiting[::2] for _ in range(2)]
    assert set(waiting) == set(groups)


# Cost.


class Watched(Request):
    """Notes whenever one of its attributes is read or it is compared, once it is watched."""

    touched: list[Request] | None = None

    def __getattribute__(self, name):
        if Watched.touched is not None and not name.startswith("__"):
            Watched.touched.append(self)
        return super().__getattribute__(name)

    def __eq__(self, other):
        if Watched.touched is not None:
            Watched.touched.append(self)
        return self is other

    __hash__ = object.__hash__


@pytest.mark.parametrize("kind", [Scheduler, pytest.param("searches", id="planted")])
def test_steps_and_ends_touch_nobody_else_who_waits(kind, monkeypatch):
    """Whatever grows with the number that wait, in Python or within a list, would touch them."""

    class Searches(Scheduler):
        def finish(self, request, reason, error=None):
            assert request in list(self.waiting) or request in self.running
            super().finish(request, reason, error)

    kind = Searches if kind == "searches" else kind
    simulation = Simulation(num_blocks=12, max_num_seqs=3, scheduler=kind)
    monkeypatch.setattr("simulation.Request", Watched)
    running = [simulation.add(6, 20) for _ in range(3)]
    simulation.step()
    waiting = [simulation.add(6, 20, deadline=1000.0) for _ in range(500)]
    scheduler = simulation.scheduler
    monkeypatch.setattr(Watched, "touched", [])
    for _ in range(12):  # within which the last of those that run loses its blocks
        output = scheduler.schedule()
        scheduler.advance(output)
        for item in output.scheduled:
            scheduler.append_token(item.request, 5)
        assert scheduler.expired(10.0) == []
    for request in (waiting[200], running[0]):
        scheduler.finish(request, "cancelled")
    touched = {id(request) for request in Watched.touched or ()}
    monkeypatch.setattr(Watched, "touched", None)
    assert running[2].num_preemptions == 1
    others = [request for request in waiting[1:] if request is not waiting[200]]
    found = [request for request in others if id(request) in touched]
    assert bool(found) == (kind is Searches)


def test_the_bound_of_the_first_is_counted_down(monkeypatch):
    """With work for three steps a request must not be the first for four."""
    simulation = Simulation(num_blocks=9, max_num_batched_tokens=1)
    monkeypatch.setattr("order_of_service.stay_work", lambda request: 3)
    simulation.add(9, 2)
    for _ in range(3):
        simulation.step()
    with pytest.raises(AssertionError, match="starves"):
        simulation.step()


# Planted mistakes: each is found in whole lives.


class NeverMakesRoom(Scheduler):
    """Groups wait for one another for ever."""

    def _make_room(self, request):
        return False


class RowsOfTheirOwnTime(Scheduler):
    """Every row is as late as it is: others come between those of a group."""

    def add(self, request):
        row, request.row = request.row, 0
        super().add(request)
        request.row = row


class PreemptsTheLastLetIn(Scheduler):
    def _last_of_running(self):
        return self.running[-1]


class ServesTheUrgentOnly(Scheduler):
    """Priorities before all else: who is less urgent may wait for ever."""

    def add(self, request):
        super().add(request)
        self.waiting.discard(request)
        request.service_key = request.priority, request.service_key[1]
        self.waiting.push(request)


class LetsInByAgeAlone(Scheduler):
    def add(self, request):
        priority, request.priority = request.priority, 0
        super().add(request)
        request.priority = priority


class KeepsDeadlinesOfTheEnded(Scheduler):
    def finish(self, request, reason, error=None):
        discard, self._deadlines.discard = self._deadlines.discard, lambda request: None
        try:
            super().finish(request, reason, error)
        finally:
            self._deadlines.discard = discard


class ComputesPromptsFirst(Scheduler):
    """Who has the most to compute comes first: the others' next tokens wait for it."""

    def _num_decodes(self, budget):
        return 0

    def _plan(self):
        running = self.running
        self.running = sorted(running, key=lambda r: r.num_computed_tokens - r.num_tokens)
        try:
            return super()._plan()
        finally:
            self.running = running


def live(kind: type[Scheduler], num_lives: int = 40) -> None:
    for seed in range(num_lives):
        lives = Lives.drawn(random.Random(seed), scheduler=kind)
        lives.run(60)
        lives.run_to_end(2000)
        lives.retire()
        lives.check_outputs()


@pytest.mark.parametrize(
    "broken",
    [NeverMakesRoom, PreemptsTheLastLetIn, KeepsDeadlinesOfTheEnded, ComputesPromptsFirst],
    ids=lambda cls: cls.__name__,
)
def test_planted_mistake_is_found(broken):
    with pytest.raises(AssertionError):
        live(broken)


@pytest.mark.parametrize(
    ("broken", "find"),
    [
        (RowsOfTheirOwnTime, test_the_keys_of_a_group_follow_one_another),
        (LetsInByAgeAlone, test_lower_priorities_are_served_first),
        (ServesTheUrgentOnly, lambda: test_a_level_is_worth_so_many_seconds(1, 0.5, True)),
    ],
    ids=["RowsOfTheirOwnTime", "LetsInByAgeAlone", "ServesTheUrgentOnly"],
)
def test_planted_order_is_found(broken, find, monkeypatch):
    original = Simulation.__init__
    monkeypatch.setattr(
        Simulation,
        "__init__",
        lambda self, **fields: original(self, **{"scheduler": broken, **fields}),
    )
    with pytest.raises(AssertionError):
        find()
