"""AsyncEngine: tokens, cancelled tasks, killed consumers, many event loops, shutdown."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
from engine_helpers import (  # noqa: F401 - the fixtures are used by name
    core_of,
    expected_fixture,
    gated_fixture,
    greedy,
    make_engine_fixture,
    model_fixture,
    wait_until,
    within,
)

import fastgen
from fastgen import AsyncEngine, EngineClosedError, InvalidRequestError, QueueFullError

LIMIT = 30


def run(coroutine):
    """The result of a coroutine in an event loop of its own; a failure instead of a hang."""

    async def limited():
        return await asyncio.wait_for(coroutine, LIMIT)

    return asyncio.run(limited())


@pytest.fixture
def engine(model):
    """An engine that must be empty at the end."""
    engine = AsyncEngine(model)
    yield engine
    wait_until(lambda: within(engine.engine.metrics).num_running == 0)
    metrics = within(engine.engine.metrics)
    assert metrics.num_waiting == 0
    assert metrics.num_free_blocks == metrics.num_blocks, "a block is left"
    run(engine.shutdown())


async def read(engine, row, count) -> list[int]:
    request = await engine.submit(row, greedy(count))
    return [token async for event in engine.stream(request) for token in event.token_ids]


def test_streams_equal_transformers(engine, expected):
    rows, tokens = expected

    async def main():
        return await asyncio.gather(*(read(engine, row, 20) for row in rows))

    assert run(main()) == [own[:20] for own in tokens]


def test_events_are_those_of_the_engine(engine, expected):
    async def main():
        request = await engine.submit(expected[0][2], greedy(9))
        return [event async for event in engine.stream(request)]

    events = run(main())
    assert [event.token_ids for event in events] == [*([t] for t in expected[1][2][:9]), []]
    assert [event.finish_reason for event in events] == [None] * 9 + ["length"]


def test_generate(engine, expected):
    rows, tokens = expected

    async def main():
        return await asyncio.gather(*(engine.generate(row, greedy(10)) for row in rows))

    assert [output.token_ids for output in run(main())] == [own[:10] for own in tokens]


def test_bad_requests_are_refused(engine):
    async def main():
        for prompt in ([], [10**6], None):
            with pytest.raises(InvalidRequestError):
                await engine.submit(prompt)
        with pytest.raises(InvalidRequestError, match="deadline_s"):
            await engine.submit([1], deadline_s=-1)
        with pytest.raises(InvalidRequestError, match="priority"):
            await engine.generate([1], priority=0.5)

    run(main())


def test_a_full_queue(make_engine, expected):
    engine = AsyncEngine(make_engine(max_queue=2).model)

    async def main():
        await engine.pause()
        tasks = [asyncio.create_task(engine.generate(expected[0][0], greedy(3))) for _ in range(3)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(QueueFullError):
            await done.pop()
        await engine.resume()
        rest = await asyncio.gather(*tasks, return_exceptions=True)
        return [each.token_ids for each in rest if not isinstance(each, Exception)]

    assert run(main()) == [expected[1][0][:3]] * 2


def test_a_cancelled_task_ends_its_request(engine, expected):
    async def main():
        task = asyncio.create_task(engine.generate(expected[0][0], greedy(400)))
        while not (await engine.metrics()).num_running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    wait_until(lambda: within(engine.engine.metrics).finished.get("cancelled") == 1)


def test_a_task_cancelled_while_it_submits_leaves_no_request(engine, expected):
    """Its request comes into being after the task has gone."""
    begun, go_on = threading.Event(), threading.Event()
    submit = engine.engine.submit

    def slow_submit(*args, **kwargs):
        begun.set()
        assert go_on.wait(LIMIT)
        return submit(*args, **kwargs)

    engine.engine.submit = slow_submit

    async def main():
        task = asyncio.create_task(engine.submit(expected[0][0], greedy(400)))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    run(main())
    wait_until(lambda: within(engine.engine.metrics).finished.get("cancelled") == 1)


@pytest.mark.parametrize("how", ["break", "raise", "cancel", "forget"])
def test_a_consumer_that_goes_away_ends_its_request(engine, expected, how):
    async def consume(request):
        async for _ in engine.stream(request):
            if how == "raise":
                raise KeyError
            if how == "break":
                break

    async def main():
        request = await engine.submit(expected[0][0], greedy(400))
        if how == "forget":
            stream = engine.stream(request)
            await anext(stream)
            del stream
            gc.collect()
        else:
            task = asyncio.create_task(consume(request))
            if how == "cancel":
                await asyncio.sleep(0.02)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return request

    request = run(main())
    assert request.done.wait(LIMIT)
    assert request.finish_reason == "cancelled"


def test_cancel(engine, expected):
    async def main():
        request = await engine.submit(expected[0][0], greedy(400))
        await engine.cancel(request)
        metrics = await engine.metrics()
        assert metrics.num_free_blocks == metrics.num_blocks
        return await engine.result(request)

    assert run(main()).finish_reason == "cancelled"


def test_two_loops_in_two_threads(engine, expected):
    rows, tokens = expected
    found = {}

    def in_thread(place):
        found[place] = run(read(engine, rows[place], 20))

    threads = [threading.Thread(target=in_thread, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert found == {place: tokens[place][:20] for place in range(2)}


def test_a_loop_that_is_gone_holds_up_nobody(engine, expected):
    """Its coroutine still listens when the engine has news."""

    async def main():
        request = await engine.submit(expected[0][0], greedy(300))
        request.news.listen(engine._listening(request)._hear)
        return request

    request = run(main())
    assert within(engine.engine.result, request).finish_reason == "length"


def test_one_wake_up_for_a_step(engine, expected):
    """However many listen, the engine's thread calls the event loop once, until that has woken."""
    rows = expected[0]

    async def main():
        calls = []
        loop = asyncio.get_running_loop()
        requests = [await engine.submit(row, greedy(30)) for row in rows]
        streams = [asyncio.create_task(engine.result(request)) for request in requests]
        await asyncio.sleep(0)
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: calls.append(args[0]) or call(*args)
        await asyncio.gather(*streams)
        return [each for each in calls if getattr(each, "__name__", "") == "_wake"]

    wakes = run(main())
    assert 0 < len(wakes) < 30 * len(rows)


def test_shutdown_drains(make_engine, expected):
    rows, tokens = expected
    engine = AsyncEngine(make_engine().model)

    async def main():
        requests = [await engine.submit(row, greedy(20)) for row in rows[:3]]
        await engine.shutdown()
        await engine.shutdown()  # again changes nothing
        for call in (engine.submit(rows[0]), engine.metrics(), engine.pause()):
            with pytest.raises(EngineClosedError):
                await call
        return [(await engine.result(request)).token_ids for request in requests]

    assert run(main()) == [own[:20] for own in tokens[:3]]


def test_leaving_the_block_ends_what_runs(make_engine, expected):
    model = make_engine().model

    async def main():
        async with AsyncEngine(model) as engine:
            return await engine.submit(expected[0][0], greedy(400))

    assert run(main()).finish_reason == "cancelled"
    assert isinstance(fastgen.Engine(model).generate([[1]])[0].token_ids, list)
