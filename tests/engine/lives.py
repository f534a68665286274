"""Requests in all states of life, for as many steps as one likes, in a scheduler of ints."""

from __future__ import annotations

import random
from typing import Any

from fork_simulation import ForkSimulation
from simulation import VOCAB

from fastgen.engine.request import Request

SALTS = (None, b"one", b"one", b"two")
MAX_LIVE = 14  # more wait than may run, and a full check stays cheap


class Lives(ForkSimulation):
    """What happens is drawn by `rng`; requests that have ended are checked and forgotten."""

    def __init__(self, rng: random.Random, **settings: Any) -> None:
        super().__init__(rng, **settings)
        self.capacity = self.scheduler.pool.num_usable * self.scheduler.block_size
        self.longest = min(24, self.capacity)
        self.num_ended = 0

    @classmethod
    def drawn(cls, rng: random.Random, **settings: Any) -> Lives:
        """Of random sizes; the pools are too small for all rows."""
        block_size = rng.choice([1, 2, 4, 16])
        return cls(
            rng,
            num_blocks=max(3, rng.randint(12, 100) // block_size),
            block_size=block_size,
            max_num_seqs=rng.randint(1, 8),
            max_num_batched_tokens=rng.choice([1, 2, 7, 16, 32]),
            **settings,
        )

    def run(self, num_steps: int) -> None:
        """So many steps with something to run; others are not counted."""
        end = self.num_steps + num_steps
        while self.num_steps < end:
            self.happen()
            self.expire()
            if not self.step().num_seqs:
                self.num_steps -= 1
            for request in list(self.late):
                if self.rng.random() < 0.7:
                    self.feed(request)
            if self.num_steps % 64 == 0:
                self.retire()

    def happen(self) -> None:
        """Perhaps something from outside; something comes if nothing is there."""
        rng, draw = self.rng, self.rng.random()
        if not self.scheduler.has_requests or (draw < 0.4 and self.has_room):
            self.arrive()
        elif draw < 0.44:
            self.end_one(rng.randrange(100), rng.random() < 0.2)
        elif draw < 0.445:
            self.undo_step()
        elif draw < 0.45:
            self.now += rng.randint(0, 200)
        elif draw < 0.452:
            self.change_weights()

    @property
    def has_room(self) -> bool:
        scheduler = self.scheduler
        return len(scheduler.running) + len(scheduler.waiting) < MAX_LIVE

    def arrive(self) -> None:
        rng = self.rng
        fields: dict[str, Any] = {
            "salt": rng.choice(SALTS),
            "query_token_id": rng.randrange(VOCAB) if rng.random() < 0.1 else None,
            "priority": rng.choice([0, 0, 0, 1, -1, 5]),
            "deadline": self.now + rng.expovariate(1 / 60) if rng.random() < 0.2 else None,
        }
        if rng.random() < 0.15:
            num_beams, num_prompt = rng.randint(2, 4), rng.randint(1, 6)
            self.add_group(rng.randint(1, 2), num_beams, num_prompt, rng.randint(1, 8), **fields)
            return
        num_prompt = rng.randint(1, max(1, self.longest * 2 // 3))
        self.add(
            num_prompt,
            rng.randint(1, max(1, self.longest - num_prompt)),
            late=rng.random() < 0.1,
            alike=True,
            rng=rng,
            stop_token_ids=frozenset(rng.sample(range(VOCAB), rng.choice([0, 0, 2]))),
            **fields,
        )

    def end_one(self, index: int, failed: bool) -> None:
        if live := self.live:
            self.note_shared()
            error = RuntimeError("planned") if failed else None
            reason = "error" if failed else "cancelled"
            self.scheduler.finish(live[index % len(live)], reason, error)
            self.end_broken_groups()

    def end_one_while_a_step_runs(self, index: int, failed: bool) -> None:
        output, _ = self.schedule()
        sampled = self.runner.run(output)
        self.end_one(index, failed)
        self.scheduler.advance(output)
        for request, token_id in sampled.items():
            if request in self.late:
                self.late[request] = token_id
            else:
                self.scheduler.append_token(request, token_id)

    def change_weights(self) -> None:
        self.note_shared()
        self.scheduler.pool.forget_all()

    def expire(self) -> list[Request]:
        expired = super().expire()
        if expired:
            self.end_broken_groups()
        return expired

    def end_broken_groups(self) -> None:
        """A caller that hears that one of its rows has ended gives the others up."""
        for group in self.groups:
            ended = [request.finish_reason is not None for request in group.rows]
            if any(ended) and not all(ended):
                self.end(group)

    def retire(self) -> None:
        """Check the tokens of those who have ended, and forget them."""
        for request in self.requests:
            if request.finish_reason is not None:
                self.check_tokens(request)
                self.late.pop(request, None)
                self.num_ended += 1
        for group in self.groups:
            assert [request.output_token_ids for request in group.rows] == group.outputs
        self.requests = self.live
        self.groups = [group for group in self.groups if group.rows[0].finish_reason is None]
