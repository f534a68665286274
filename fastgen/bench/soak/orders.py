"""What is asked of the engine: prompts, parameters and conducts, each drawn from a seed.

Order i depends on the seed and on i alone, so that it can be made again later, whatever became of
it the first time.
"""

from __future__ import annotations

import enum
import functools
import random
from dataclasses import dataclass

from ...config import SamplingParams

# Prompts are walks in a tree, from its root, with a tail of their own.
BRANCHES, MAX_DEPTH = 4, 3
NODE_TOKENS, TAIL_TOKENS = (16, 48), (1, 32)
LONG_PROMPTS = 0.01  # so many have a tail of a quarter to a half of what can be: they are chunked

OUTPUT_LEAST, OUTPUT_ALPHA, OUTPUT_MOST = 6, 1.5, 96  # Pareto's law
FEW_TOKENS = 8  # after so many, or fewer, something happens midway


class Conduct(enum.Enum):
    """What becomes of a request that somebody has submitted."""

    READS = "is read as it comes"
    WAITS = "is waited for"
    READS_SLOWLY = "is read slowly"
    CANCELS_AT_ONCE = "is cancelled at once"
    CANCELS_MIDWAY = "is cancelled midway"
    CANCELS_LATE = "is cancelled after its end"
    HAS_A_DEADLINE = "has a deadline"
    IS_KILLED = "has a reader that is killed"
    IS_FORGOTTEN = "has a stream that is dropped"
    LEAVES_EARLY = "has a reader that leaves"
    GIVES_UP = "is given up while it is submitted"


WEIGHTS = {
    Conduct.READS: 30,
    Conduct.WAITS: 20,
    Conduct.READS_SLOWLY: 7,
    Conduct.CANCELS_AT_ONCE: 7,
    Conduct.CANCELS_MIDWAY: 8,
    Conduct.CANCELS_LATE: 4,
    Conduct.HAS_A_DEADLINE: 8,
    Conduct.IS_KILLED: 6,
    Conduct.IS_FORGOTTEN: 4,
    Conduct.LEAVES_EARLY: 4,
    Conduct.GIVES_UP: 2,
}
# Those that end midway get long outputs, which do not end by themselves.
MIDWAY = {
    Conduct.CANCELS_MIDWAY,
    Conduct.IS_KILLED,
    Conduct.IS_FORGOTTEN,
    Conduct.LEAVES_EARLY,
}
# How each may end besides "stop" and "length".
MAY_END_BY = {
    **{conduct: {"cancelled"} for conduct in (*MIDWAY, Conduct.CANCELS_AT_ONCE, Conduct.GIVES_UP)},
    Conduct.HAS_A_DEADLINE: {"deadline"},
}


@dataclass(frozen=True)
class Order:
    """One prompt, how it is to be continued, and what becomes of it.

    patience: Tokens that are read before something happens midway. pause_s: Between two reads of
    a slow reader, and before what is cancelled at once. is_checked: Its tokens are
    compared with those of a run alone.
    """

    index: int
    prompt: list[int]
    params: SamplingParams
    conduct: Conduct
    priority: int
    deadline_s: float | None
    patience: int
    pause_s: float
    is_checked: bool

    @property
    def may_end_by(self) -> set[str]:
        """Reasons with which it may end."""
        return {"stop", "length"} | MAY_END_BY.get(self.conduct, set())


def make_order(index: int, seed: int, vocab_size: int, longest: int, checked_share: float) -> Order:
    """The order of that index.

    longest: Tokens of the longest sequence that the engine can take, at least 480.
    checked_share: Probability that it is compared with a run alone.
    """
    draw = random.Random(f"{seed} order {index}")
    (conduct,) = draw.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))
    late = conduct is Conduct.HAS_A_DEADLINE
    return Order(
        index,
        _prompt(draw, seed, vocab_size, longest),
        _params(draw, index, vocab_size, conduct),
        conduct,
        priority=draw.choice((0, 0, 0, -2, -1, 1, 2)),
        deadline_s=draw.choice((0.0, draw.uniform(0.0, 1.0), draw.uniform(1.0, 4.0)))
        if late
        else None,
        patience=draw.randint(1, FEW_TOKENS),
        pause_s=draw.choice((0.0, draw.uniform(0.0, 0.02))),
        is_checked=draw.random() < checked_share,
    )


def _prompt(draw: random.Random, seed: int, vocab_size: int, longest: int) -> list[int]:
    tokens: list[int] = []
    path = ""
    for _ in range(draw.randint(0, MAX_DEPTH)):
        path += str(draw.randrange(BRANCHES))
        tokens += _node(path, seed, vocab_size)
    is_long = draw.random() < LONG_PROMPTS
    length = draw.randint(*((longest // 4, longest // 2) if is_long else TAIL_TOKENS))
    return tokens + draw.choices(range(vocab_size), k=length)


@functools.cache  # no more than the nodes of one tree for each seed
def _node(path: str, seed: int, vocab_size: int) -> tuple[int, ...]:
    draw = random.Random(f"{seed} node {path}")
    return tuple(draw.choices(range(vocab_size), k=draw.randint(*NODE_TOKENS)))


def _params(draw: random.Random, index: int, vocab_size: int, conduct: Conduct) -> SamplingParams:
    def sometimes(share: float, value: object, otherwise: object) -> object:
        return value if draw.random() < share else otherwise

    midway = conduct in MIDWAY
    length = min(OUTPUT_MOST, int(OUTPUT_LEAST * draw.paretovariate(OUTPUT_ALPHA)))
    sampled = {"temperature": 0.8, "top_p": 0.95, "top_k": draw.choice((0, 40)), "seed": index}
    fields: dict = {
        "max_tokens": OUTPUT_MOST if midway else length,
        "ignore_eos": midway,
        **(sampled if draw.random() < 0.5 else {"temperature": 0.0}),
        "n": sometimes(0.03, draw.randint(2, 3), 1),
        "logprobs": sometimes(0.05, 2, None),
        "repetition_penalty": sometimes(0.05, 1.2, 1.0),
        "logit_bias": sometimes(0.05, {draw.randrange(vocab_size): 5.0}, {}),
        "stop": sometimes(0.0 if midway else 0.05, ("\n\n", "e("), ()),
    }
    return SamplingParams(**fields)
