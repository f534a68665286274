"""Whole lives of requests in any order of events: hypothesis draws them, ints stand for the model.

Each step is checked for the order of service, the budget and the number of blocks, and each token
that is written for an empty slot to go to; with `check_every`, some steps are checked for all that
simulation.py knows. For a longer run say how many steps:

    FASTGEN_TEST_STEPS=10000000 pytest tests/engine/test_scheduler_life.py
"""

from __future__ import annotations

import os
import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from lives import SALTS, Lives
from simulation import VOCAB

NUM_STEPS = int(os.environ.get("FASTGEN_TEST_STEPS", "100000"))

INDEX = st.integers(0, 100)
PRIORITIES = st.sampled_from([0, 0, 1, -1, 7])
DEADLINES = st.none() | st.integers(0, 60)


class LifeMachine(RuleBasedStateMachine):
    """Anything that callers, the engine and time can do, in pools that are too small."""

    check_every = 1
    steps_at_once = 10
    num_steps = num_ended = 0  # of all examples

    @initialize(
        num_blocks=st.integers(2, 24),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(1, 20),
        seed=st.integers(0, 2**32),
    )
    def start(self, seed, **limits):
        self.lives = Lives(random.Random(seed), check_every=self.check_every, **limits)

    @rule(
        num_prompt=st.integers(1, 12),
        max_tokens=st.integers(1, 12),
        late=st.booleans(),
        query=st.none() | st.integers(0, VOCAB - 1),
        stop=st.frozensets(st.integers(0, VOCAB - 1), max_size=4),
        seed=INDEX,
        salt=st.sampled_from(SALTS),
        priority=PRIORITIES,
        deadline=DEADLINES,
    )
    def add(self, num_prompt, max_tokens, late, query, stop, seed, salt, priority, deadline):
        self.lives.add(
            num_prompt,
            max_tokens,
            late=late,
            salt=salt,
            alike=True,
            rng=random.Random(seed),
            query_token_id=query,
            stop_token_ids=stop,
            priority=priority,
            deadline=None if deadline is None else self.lives.now + deadline,
        )

    @rule(
        num_prompts=st.integers(1, 2),
        num_beams=st.integers(1, 3),
        num_prompt=st.integers(1, 8),
        max_tokens=st.integers(1, 8),
        salt=st.sampled_from(SALTS),
        priority=PRIORITIES,
        deadline=DEADLINES,
    )
    def add_group(self, deadline, **fields):
        deadline = None if deadline is None else self.lives.now + deadline
        self.lives.add_group(deadline=deadline, **fields)

    @rule(times=st.integers(1, 5))
    def step(self, times):
        for _ in range(times):
            self.lives.step()

    @rule(portion=st.floats(0.5, 1))
    def live(self, portion):
        """More happens, and more steps are run, than rules could do in the same time."""
        self.lives.run(round(portion * self.steps_at_once))

    @rule(index=INDEX, failed=st.booleans())
    def end_one(self, index, failed):
        self.lives.end_one(index, failed)

    @rule(index=INDEX, failed=st.booleans())
    def end_one_while_a_step_runs(self, index, failed):
        self.lives.end_one_while_a_step_runs(index, failed)

    @rule()
    def a_step_fails(self):
        self.lives.undo_step()

    @rule(seconds=st.integers(0, 100))
    def time_passes(self, seconds):
        self.lives.now += seconds
        self.lives.expire()

    @rule(index=INDEX)
    def feed(self, index):
        if late := list(self.lives.late):
            self.lives.feed(late[index % len(late)])

    @rule()
    def change_weights(self):
        self.lives.change_weights()

    @invariant()
    def state_is_consistent(self):
        if hasattr(self, "lives"):
            self.lives.check_state()

    def teardown(self):
        if hasattr(self, "lives"):
            self.lives.run_to_end()
            self.lives.retire()
            self.lives.check_outputs()
            type(self).num_steps += self.lives.num_steps
            type(self).num_ended += self.lives.num_ended


LifeMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLifeMachine = LifeMachine.TestCase


class LongLives(LifeMachine):
    """Few rules and many steps between them, of which one in 64 is checked for everything."""

    check_every = 64
    steps_at_once = 1500


def test_long_lives():
    explore = settings(
        max_examples=10,
        stateful_step_count=20,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    LongLives.num_steps = LongLives.num_ended = 0
    while LongLives.num_steps < NUM_STEPS:
        run_state_machine_as_test(LongLives, settings=explore)
    assert LongLives.num_ended > NUM_STEPS // 30


def test_the_lives_reach_what_they_are_for():
    lives = [Lives.drawn(random.Random(seed), check_every=16) for seed in range(12)]
    for each in lives:
        each.run(300)
    stats = [each.scheduler.stats for each in lives]
    assert {reason for each in stats for reason in each.finished} == {
        "stop",
        "length",
        "cancelled",
        "deadline",
        "error",
    }
    assert sum(each.preemptions for each in stats) > 50
    assert sum(each.forks for each in stats) > 50
    assert sum(each.block_copies for each in stats) > 20
    assert sum(each.prefix_hit_tokens for each in stats) > 300
