"""The states of a request's life: what may follow what, and what each change does."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
from simulation import Simulation

import fastgen
from fastgen.config import SamplingParams
from fastgen.engine.request import FINISH_REASONS, TRANSITIONS, Request, RequestStatus

NEW, WAITING, RUNNING, PREEMPTED, FINISHED = RequestStatus


def simulation_with(status: RequestStatus) -> tuple[Simulation, Request]:
    """A request in this state, in a pool where two do not fit; an older one runs beside it."""
    simulation = Simulation(num_blocks=5, block_size=4, max_num_batched_tokens=100)
    old = simulation.add(7, 9)
    if status is NEW:
        request = Request([1, 2, 3, 4, 5, 6, 7], SamplingParams(max_tokens=9, temperature=0.0))
        return simulation, request
    request = simulation.add(7, 9)
    if status is RUNNING:
        simulation.step()
    if status in (PREEMPTED, FINISHED):
        while request.status is not PREEMPTED:
            simulation.step()
    if status is FINISHED:
        simulation.run_to_end()
    assert request.status is status
    assert old.num_preemptions == 0
    return simulation, request


def test_every_state_has_its_row():
    assert set(TRANSITIONS) == set(RequestStatus)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(RequestStatus, repeat=2)))
def test_only_what_the_table_allows(old, new):
    _, request = simulation_with(old)
    if new in TRANSITIONS[old]:
        request.move_to(new)
        assert request.status is new
    else:
        with pytest.raises(AssertionError, match=f"from {old.value} to {new.value}"):
            request.move_to(new)
        assert request.status is old


def check_new_to_waiting(simulation: Simulation, request: Request) -> None:
    simulation.now = 5.0
    simulation.scheduler.add(request)
    assert list(simulation.scheduler.waiting)[-1] is request
    assert request.service_key == (5.0, 1)
    assert request.scheduled_time is None


def check_waiting_to_running(simulation: Simulation, request: Request) -> None:
    simulation.step()
    assert simulation.scheduler.running[-1] is request
    assert request not in list(simulation.scheduler.waiting)
    assert len(request.block_ids) == 2
    assert request.scheduled_time == simulation.now == request.first_token_time


def check_running_to_preempted(simulation: Simulation, request: Request) -> None:
    output, key = list(request.output_token_ids), request.service_key
    while not request.num_preemptions:
        output = list(request.output_token_ids)
        simulation.step()
    assert request.output_token_ids == output, "what was generated is kept"
    assert (request.block_ids, request.num_computed_tokens) == ([], 0)
    assert list(simulation.scheduler.waiting) == [request]
    assert request.service_key == key, "its place is the same"
    assert simulation.scheduler.stats.preemptions == 1


def check_preempted_to_running(simulation: Simulation, request: Request) -> None:
    first_time, output = request.scheduled_time, list(request.output_token_ids)
    while request.status is PREEMPTED:
        simulation.step()
    assert request.scheduled_time == first_time, "the time in the queue ends once"
    assert request.output_token_ids[: len(output)] == output
    assert len(request.output_token_ids) == len(output) + 1
    assert request.num_computed_tokens == request.num_tokens - 1


def check_new_to_finished(simulation: Simulation, request: Request) -> None:
    request.end("cancelled", at=2.0)
    assert (request.finish_reason, request.finish_time) == ("cancelled", 2.0)
    assert not list(simulation.scheduler.expired(10.0))


def check_to_finished(simulation: Simulation, request: Request) -> None:
    scheduler = simulation.scheduler
    simulation.now += 1
    scheduler.finish(request, "cancelled")
    assert request.finish_time == simulation.now
    assert (request.finish_reason, request.block_ids) == ("cancelled", [])
    assert request not in scheduler.running
    assert request not in list(scheduler.waiting)
    assert scheduler.stats.finished == {"cancelled": 1}
    simulation.run_to_end()
    assert scheduler.stats.finished == {"cancelled": 1, "length": 1}


CHANGES = {
    (NEW, WAITING): check_new_to_waiting,
    (NEW, FINISHED): check_new_to_finished,
    (WAITING, RUNNING): check_waiting_to_running,
    (WAITING, FINISHED): check_to_finished,
    (RUNNING, PREEMPTED): check_running_to_preempted,
    (RUNNING, FINISHED): check_to_finished,
    (PREEMPTED, RUNNING): check_preempted_to_running,
    (PREEMPTED, FINISHED): check_to_finished,
}


def test_every_change_is_tried():
    assert set(CHANGES) == {(old, new) for old, follows in TRANSITIONS.items() for new in follows}


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: f"{c[0].value}-{c[1].value}")
def test_what_each_change_does(change):
    old, new = change
    simulation, request = simulation_with(old)
    CHANGES[change](simulation, request)
    assert request.status is new
    if request in simulation.requests:
        simulation.check_state()


# Why a request ends.


def end_by(reason: str) -> Request:
    """A running request that ends for this reason by what causes it."""
    simulation = Simulation(num_blocks=9)
    stops = frozenset(range(97)) if reason == "stop" else frozenset()
    request = simulation.add(3, 4, stop_token_ids=stops, deadline=3.0)
    simulation.step()
    match reason:
        case "stop":
            pass  # its first token was one
        case "length":
            simulation.run_to_end()
        case "deadline":
            simulation.now = 3.0
            assert simulation.expire() == [request]
        case "cancelled":
            simulation.scheduler.finish(request, "cancelled")
        case "error":
            simulation.scheduler.finish(request, "error", RuntimeError("planned"))
    simulation.check_state()
    assert simulation.scheduler.next_deadline() is None
    return request


@pytest.mark.parametrize("reason", FINISH_REASONS)
def test_each_reason(reason):
    request = end_by(reason)
    assert (request.status, request.finish_reason) == (FINISHED, reason)
    assert (request.error is not None) == (reason == "error")


def test_other_reasons_are_our_own_mistake():
    _, request = simulation_with(NEW)
    with pytest.raises(AssertionError, match="no reason"):
        request.end("tired")
    assert request.status is NEW


# One method.


def assignments_of_status(source: str) -> list[int]:
    """Lines that set an attribute of this name."""
    nodes = ast.walk(ast.parse(source))
    return [
        target.lineno
        for node in nodes
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and target.attr == "status"
    ]


def test_nothing_but_one_method_sets_a_status():
    engine = Path(fastgen.__file__).parent / "engine"
    found = {
        path.name: lines
        for path in engine.rglob("*.py")
        if (lines := assignments_of_status(path.read_text()))
    }
    assert {name: len(lines) for name, lines in found.items()} == {"request.py": 1}


def test_planted_assignment_is_seen():
    assert assignments_of_status("x = 1\nrequest.status = RequestStatus.RUNNING\n") == [2]
