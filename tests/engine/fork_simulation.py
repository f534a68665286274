"""Groups of forked rows in a scheduler of ints, beside other requests."""

from __future__ import annotations

import random
from typing import Any

from simulation import VOCAB, Simulation, next_token

from fastgen.config import SamplingParams
from fastgen.engine.request import Request, RequestStatus


class Group:
    """Rows as a lockstep group has them, and the tokens that each should have generated."""

    def __init__(self, rows: list[Request], num_beams: int) -> None:
        self.rows, self.num_beams = rows, num_beams
        self.leaders = [row - row % num_beams for row in range(len(rows))]
        self.outputs: list[list[int]] = [[] for _ in rows]


class ForkSimulation(Simulation):
    """Groups fork at random whenever all of their rows have offered a token."""

    def __init__(self, rng: random.Random, **settings: Any) -> None:
        super().__init__(**settings)
        self.rng = rng
        self.groups: list[Group] = []

    def add_group(
        self, num_prompts: int, num_beams: int, num_prompt: int, max_tokens: int, **fields: Any
    ) -> Group | None:
        """Queue the rows of a beam search, unless they do not fit together."""
        rng, rows = self.rng, []
        salt = fields.pop("salt", None)
        for _ in range(num_prompts):
            prompt = [(7 * i) % VOCAB for i in range(num_prompt)]
            prompt[rng.randint(0, num_prompt) :] = []
            prompt += [rng.randrange(VOCAB) for _ in range(num_prompt - len(prompt))]
            for beam in range(num_beams):
                sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
                rows.append(Request(list(prompt), sampling, needs_fork=beam > 0, **fields))
        if len(rows) > self.scheduler.max_num_seqs or not self.scheduler.fits(rows):
            return None
        group = Group(rows, num_beams)
        for request in rows:
            request.group, request.cache_root = group, salt  # pyright: ignore
            self.scheduler.add(request)
            self.requests.append(request)
            self.late[request] = None
        self.groups.append(group)
        return group

    def feed(self, request: Request) -> None:
        if not isinstance(group := request.group, Group):
            super().feed(request)
        elif request is group.rows[0] and request.status is not RequestStatus.FINISHED:
            self.feed_group(group)

    def feed_group(self, group: Group) -> None:
        """Choose what the rows go on from and their tokens, once all have offered theirs."""
        leaders = {group.rows[row] for row in group.leaders}
        if any(self.late[request] is None for request in leaders):
            return
        for request in leaders:
            generated = group.outputs[group.rows.index(request)]
            query = None if generated else request.query_token_id
            assert self.late[request] == next_token(request.prompt_token_ids + generated, query)
        if len(group.outputs[0]) + 1 >= group.rows[0].sampling.max_tokens:
            self.end(group)
            return
        parents = self.choose_parents(group)
        token_ids = [self.rng.randrange(VOCAB) for _ in parents]
        for request in group.rows:
            self.late[request] = None
        # As the lockstep group and the engine do it.
        parents = [group.leaders[parent] for parent in parents]
        group.leaders = list(range(len(group.rows)))
        group.outputs = [
            [*group.outputs[parent], token_id]
            for parent, token_id in zip(parents, token_ids, strict=True)
        ]
        self.scheduler.fork(group.rows, parents)
        self.check_state()
        for place in reversed(self.scheduler.append_tokens(group.rows, token_ids)):
            self.scheduler.append_token(group.rows[place], token_ids[place])
        self.check_state()

    def choose_parents(self, group: Group) -> list[int]:
        if self.rng.random() < 0.2:
            return list(range(len(group.rows)))
        return [
            first + self.rng.randrange(group.num_beams)
            for first in range(0, len(group.rows), group.num_beams)
            for _ in range(group.num_beams)
        ]

    def end(self, group: Group) -> None:
        for request in group.rows:
            self.scheduler.finish(request, "cancelled")

    def check_outputs(self) -> None:
        for group in self.groups:
            assert [request.output_token_ids for request in group.rows] == group.outputs
        forked = {request for group in self.groups for request in group.rows}
        self.requests = [request for request in self.requests if request not in forked]
        super().check_outputs()


def run_fork_workload(seed: int, **classes: Any) -> ForkSimulation:
    """Groups and other requests arrive and are cancelled at random, in a pool that is small."""
    rng = random.Random(seed)
    simulation = ForkSimulation(
        rng,
        num_blocks=rng.randint(8, 40),
        block_size=rng.choice([1, 2, 4, 16]),
        max_num_seqs=rng.randint(2, 8),
        max_num_batched_tokens=rng.choice([1, 2, 7, 32]),
        **classes,
    )
    capacity = simulation.scheduler.pool.num_usable * simulation.scheduler.block_size
    for _ in range(rng.randint(4, 12)):
        salts = [None, b"one", b"one", b"two"]
        if rng.random() < 0.7:
            simulation.add_group(
                rng.randint(1, 3),
                rng.randint(2, 4),
                rng.randint(1, max(1, capacity // 6)),
                rng.randint(1, 12),
                salt=rng.choice(salts),
                query_token_id=rng.randrange(VOCAB) if rng.random() < 0.2 else None,
            )
        if rng.random() < 0.6:
            num_prompt = rng.randint(1, max(1, capacity // 2))
            simulation.add(
                num_prompt,
                rng.randint(1, max(1, capacity - num_prompt)),
                salt=rng.choice(salts),
                alike=True,
                rng=rng,
            )
        for _ in range(rng.randint(0, 8)):
            simulation.step()
            for request in simulation.live:
                if request in simulation.late and rng.random() < 0.6:
                    simulation.feed(request)
        for group in simulation.groups:
            if rng.random() < 0.05:
                simulation.end(group)
    simulation.run_to_end()
    simulation.check_outputs()
    return simulation
