"""What happens to a process around an engine: Ctrl-C, forks, its end, a cell that is run again.

Each test is a process of its own, which must end by itself; most are `slow`, as starting one is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 120
BEGIN = """
import faulthandler, gc, os, random, signal, sys, threading, time
faulthandler.dump_traceback_later({limit}, exit=True)
import torch
torch.set_num_threads(2)
from tiny_models import prompts, tiny_model
import fastgen
from fastgen import SamplingParams

IDS = torch.tensor(prompts(9, 9))
GREEDY = dict(do_sample=False, max_new_tokens=12)

def blocks_are_free(core, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        metrics = core.metrics(wait=False)
        if metrics.num_free_blocks == metrics.num_blocks and not metrics.num_running:
            return True
        time.sleep(0.001)
    return False
"""


def run(script: str, limit: int = LIMIT) -> str:
    """What a script prints; it must end by itself, without an error."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN.replace("{limit}", str(limit - 10)) + script],
        env=os.environ | {"PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children, too, which may hold the pipes
        out, errors = process.communicate()
        raise AssertionError(f"it did not end\n{out}\n{errors[-3000:]}") from None
    assert process.returncode == 0, f"{process.returncode}\n{out}\n{errors[-3000:]}"
    return out


INTERRUPTS = """
model = fastgen.optimize(tiny_model("qwen2"), watchdog_s=None)
expected = model.generate(IDS, **GREEDY)
engine = fastgen.Engine(model)
core = fastgen.api.require(model).engine()
params = SamplingParams(max_tokens=100, temperature=0.0)

def read(request):
    for _ in engine.stream(request):
        pass

calls = [
    lambda: model.generate(IDS, do_sample=False, max_new_tokens=100),
    lambda: model.generate(IDS, do_sample=True, max_new_tokens=60),
    lambda: model.generate(IDS, num_beams=3, do_sample=False, max_new_tokens=20),
    lambda: engine.generate([[1, 2, 3]] * 3, params),
    lambda: read(engine.submit([4, 5, 6], params)),
    lambda: engine.result(engine.submit([4, 5, 6], SamplingParams(n=3, max_tokens=50))),
    lambda: engine.cancel(engine.submit([4, 5, 6], params)),
    lambda: engine.metrics(),
]
signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C does

def is_interrupted(call, delay):
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
        return False
    except KeyboardInterrupt:
        return True

chance, count = random.Random(SEED), 0
for call in calls:
    call()
for number in range(ROUNDS):
    call = calls[number % len(calls)]
    count += is_interrupted(call, chance.choice([0.0003, 0.003, 0.03]) * chance.random() + 1e-6)
    assert blocks_are_free(core), f"round {number}"
    if number % 50 == 0:
        assert torch.equal(model.generate(IDS, **GREEDY), expected)
assert torch.equal(model.generate(IDS, **GREEDY), expected)
assert fastgen.api.require(model).engine() is core, "the engine has died"
print(count)
"""


@pytest.mark.parametrize(
    ("seed", "rounds"),
    [(0, 100), *(pytest.param(seed, 4000, marks=pytest.mark.slow) for seed in (1, 2, 3))],
)
def test_ctrl_c_anywhere_returns_all_blocks(seed, rounds):
    script = INTERRUPTS.replace("SEED", str(seed)).replace("ROUNDS", str(rounds))
    assert int(run(script, LIMIT if rounds < 1000 else 600)) > rounds / 4, "few were interrupted"


def test_a_fork_generates_and_so_does_its_parent():
    """The child has no engine thread; it makes one, also while the parent's is in a step."""
    script = """
model = fastgen.optimize(tiny_model("qwen2"))
expected = model.generate(IDS, **GREEDY)
engine = fastgen.Engine(model)
for busy in (False, True):
    if busy:
        request = engine.submit([1, 2], SamplingParams(max_tokens=400, temperature=0.0))
    pid = os.fork()
    if pid == 0:
        gc.collect()
        ok = torch.equal(model.generate(IDS, **GREEDY), expected)
        ok = ok and engine.generate([[7]], SamplingParams(max_tokens=3))[0].error is None
        ok = ok and (not busy or "forked" in engine.result(request).outputs[0].error)
        engine.close()
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"
    assert torch.equal(model.generate(IDS, **GREEDY), expected)
assert engine.result(request).finish_reason == "length"
engine.close()
"""
    run(script)


@pytest.mark.slow
def test_multiprocessing_workers_generate():
    script = """
import multiprocessing
faulthandler.cancel_dump_traceback_later()  # its thread is not in the workers, who would wait
model = fastgen.optimize(tiny_model("qwen2"))
expected = model.generate(IDS, **GREEDY)

def work(_):
    return torch.equal(model.generate(IDS, **GREEDY), expected)

with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(work, range(4)) == [True] * 4
"""
    run(script)


ENDINGS = {
    "main thread returns": "",
    "sys.exit": "sys.exit(0)",
    "paused": "engine.pause()",
    "somebody waits": (
        "threading.Thread(target=engine.result, args=(request,), daemon=True).start()"
    ),
    "closed by atexit": "import atexit; atexit.register(engine.close)",
    "restored by atexit": "import atexit; atexit.register(fastgen.restore, model)",
    "generates in atexit": (
        "import atexit; atexit.register(lambda: print(model.generate(IDS, **GREEDY).shape))"
    ),
}


@pytest.mark.parametrize(
    "ending",
    [pytest.param(ending, id=name, marks=pytest.mark.slow) for name, ending in ENDINGS.items()],
)
def test_a_process_ends_while_requests_run(ending):
    script = """
model = fastgen.optimize(tiny_model("qwen2"))
engine = fastgen.Engine(model)
request = engine.submit([1, 2, 3], SamplingParams(max_tokens=450, temperature=0.0))
"""
    run(script + ending)


@pytest.mark.slow
def test_asyncio_ends_while_requests_run():
    script = """
import asyncio
model = fastgen.optimize(tiny_model("qwen2"))

async def main():
    engine = fastgen.AsyncEngine(model)
    request = await engine.submit([1, 2, 3], SamplingParams(max_tokens=450, temperature=0.0))
    async for event in engine.stream(request):
        break
    await engine.submit([1, 2, 3], SamplingParams(max_tokens=450, temperature=0.0))

asyncio.run(main())
"""
    run(script)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_process_that_generates(number):
    """SIGTERM ends it as it ends any; SIGINT with KeyboardInterrupt, which nobody catches."""
    script = f"""
model = fastgen.optimize(tiny_model("qwen2"))
threading.Timer(0.2, os.kill, args=(os.getpid(), {int(number)})).start()
while True:
    model.generate(IDS, do_sample=False, max_new_tokens=400)
"""
    with pytest.raises(AssertionError) as caught:
        run(script)
    assert str(caught.value).splitlines()[0].split()[-1] in (f"-{int(number)}", "1", "130")


def test_a_cell_that_is_run_again():
    """The names are bound anew, streams are left half read; what was there goes away."""
    script = """
cell = '''
model = fastgen.optimize(tiny_model("qwen2"))
engine = fastgen.Engine(model, max_queue=None)
events = engine.stream(engine.submit([1, 2, 3], SamplingParams(max_tokens=400)))
first = next(events)
fastgen.optimize(model)
out = model.generate(IDS, **GREEDY)
'''
for _ in range(6):
    exec(cell)
gc.collect()
end = time.monotonic() + 20
while time.monotonic() < end:
    names = [thread.name for thread in threading.enumerate()]
    if names.count("fastgen-engine") == names.count("fastgen-watchdog") == 1:
        break
    time.sleep(0.01)
    gc.collect()
assert names.count("fastgen-engine") == names.count("fastgen-watchdog") == 1, names
"""
    run(script)
