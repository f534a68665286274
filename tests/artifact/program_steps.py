"""A rewritten graph of a tiny model, and steps that every form of it must compute alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fastgen.passes import CapturedGraph
from tiny_models import VOCAB, tiny_model

from fastgen.capture import capture
from fastgen.compiled import CompiledForward, rewrite
from fastgen.engine.batch import ForwardBatch
from fastgen.engine.kv_cache import KVCache
from fastgen.live import LiveWeights

BLOCK_SIZE = 16
_BLOCKS = 7  # the null block, and three for each of two sequences
_TABLE = torch.tensor([[5, 2, 3], [1, 6, 4]], dtype=torch.int32)
# New tokens of the two sequences, step by step: a prompt in chunks, up to a block's end and over
# it, beside another's, then tokens of both and of one alone.
STEPS = ((16, 0), (17, 5), (1, 1), (1, 1), (0, 1))


@dataclass
class Rewritten:
    """forward: The direct program with its weights bound; graph: what it was made from."""

    model: torch.nn.Module
    weights: LiveWeights
    graph: CapturedGraph
    forward: CompiledForward

    def cache(self) -> KVCache:
        """A fresh cache; what no step wrote is NaN."""
        cache = KVCache(self.forward.spec, _BLOCKS, BLOCK_SIZE, torch.device("cpu"))
        cache.poison(range(1, _BLOCKS))
        return cache


def rewritten(
    family: str | torch.nn.Module,
    *,
    passes_off: tuple[str, ...] = (),
    pack_bytes: int = 0,
    **fields,
) -> Rewritten:
    """A tiny model of a family, or one that is given."""
    model = tiny_model(family, **fields) if isinstance(family, str) else family
    captured = capture(model)
    captured.pack_budget_bytes = pack_bytes
    graph, report = rewrite(captured, passes_off)
    weights = LiveWeights(model)
    weights.attach(graph.merges)
    forward = CompiledForward(graph.copy(), report)
    forward.bind(weights.resolve(forward.weight_inputs))
    return Rewritten(model, weights, graph, forward)


def batches() -> list[ForwardBatch]:
    generator = torch.Generator().manual_seed(0)
    done, made = [0, 0], []
    for news in STEPS:
        rows = [row for row, new in enumerate(news) if new]
        places = [torch.arange(done[row], done[row] + news[row], dtype=torch.int64) for row in rows]
        slots = [
            _TABLE[row, place // BLOCK_SIZE].long() * BLOCK_SIZE + place % BLOCK_SIZE
            for row, place in zip(rows, places, strict=True)
        ]
        ends = list(itertools.accumulate(news[row] for row in rows))
        for row in rows:
            done[row] += news[row]
        made.append(
            ForwardBatch(
                input_ids=torch.randint(2, VOCAB, (ends[-1],), generator=generator),
                positions=torch.cat(places),
                slot_mapping=torch.cat(slots),
                query_start_loc=torch.tensor([0, *ends], dtype=torch.int32),
                seq_lens=torch.tensor([done[row] for row in rows], dtype=torch.int32),
                block_table=_TABLE[rows, : -(-max(done) // BLOCK_SIZE)].contiguous(),
                logits_indices=torch.tensor(ends) - 1,
            )
        )
    return made


def logits_and_cache(
    case: Rewritten, run: Callable[..., torch.Tensor]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The logits of every step, and the cache after them, but for the null block."""
    cache = case.cache()
    with torch.inference_mode():
        logits = [run(*case.forward.arguments(batch, cache)) for batch in batches()]
    return logits, {name: tensor[1:] for name, tensor in cache.tensors.items()}


def direct(case: Rewritten) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The same by the direct program."""
    cache = case.cache()
    with torch.inference_mode():
        logits = [case.forward(batch, cache) for batch in batches()]
    return logits, {name: tensor[1:] for name, tensor in cache.tensors.items()}


def assert_alike(found, expected, dtype: torch.dtype, factor: float) -> None:
    """Logits and caches differ by `factor` roundings of the largest; unwritten slots are NaN."""
    for one, other in zip(found[0], expected[0], strict=True):
        _assert_close(one, other, dtype, factor)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert torch.equal(found[1][name].isnan(), tensor.isnan()), f"{name}: other slots written"
        _assert_close(found[1][name].nan_to_num(), tensor.nan_to_num(), dtype, factor)


def _assert_close(found, expected, dtype, factor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    allowed = factor * torch.finfo(dtype).eps * expected.abs().max()
    worst = (found.double() - expected.double()).abs().max()
    assert worst <= allowed, f"differs by {worst}, {allowed} is allowed"
