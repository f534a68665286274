"""fuse_rope_store: rotation and cache write become one op, bit-equal; near misses are refused."""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels import attention, rope
from fastgen.passes import run_passes
from fastgen.passes.fuse_rope_store import fuse_rope_store
from fastgen.passes.insert_paged_cache import cache_spec, insert_paged_cache
from fastgen.passes.pipeline import check_form, check_values
from test_graph import lift
from test_insert_paged_cache import Cache
from torch import nn

FUSED = torch.ops.fastgen.rope_store_kv.default
PAGED = torch.ops.fastgen.paged_attention.default
ROPE = torch.ops.fastgen.rope.default


class Rotated(nn.Module):
    """One attention of 4 query and 2 KV heads of 8, rotated; `miss` says what is unusual."""

    def __init__(self, miss: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 12)
        self.o = nn.Linear(24, 16)
        self.miss = miss

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = self.q(x).unflatten(-1, (4, 8)), self.k(x).unflatten(-1, (2, 8))
        value = self.v(x).unflatten(-1, (2, 6))
        angles = x[:, :6]
        cos, sin = angles.cos(), angles.sin()
        turned_query, turned_key = rope(query, key, cos, sin, False)
        added = torch.zeros(())
        match self.miss:
            case "key of no rope":
                turned_key = key
            case "two ropes":
                turned_key = rope(query, key, sin, cos, False)[1]
            case "read by others":
                added = turned_key.sum()
        output = attention(turned_query, turned_key, value, None, 0.3, 0, 0.0, None, 0)
        return x + self.o(output.flatten(-2)) + added


def fused(miss: str = ""):
    module = Rotated(miss)
    captured = lift(module, torch.randn(5, 16))
    insert_paged_cache(captured)
    before = captured.copy()
    report = fuse_rope_store(captured)
    check_form(captured)
    check_values(before, captured)
    return module, before, captured, report


def test_it_fires_once_per_attention_and_then_never():
    _, before, after, report = fused()
    assert (report.matches, report.refused) == (1, [])
    targets = [node.target for node in after.graph.nodes]
    assert (targets.count(FUSED), targets.count(PAGED), targets.count(ROPE)) == (1, 1, 0)
    assert cache_spec(after) == cache_spec(before)
    (call,) = (node for node in after.graph.nodes if node.target is PAGED)
    assert call.args[5] is None, "the keys are stored already"
    again = fuse_rope_store(after)
    assert (again.matches, again.refused) == (0, [])


@pytest.mark.parametrize("length", [2, 16, 33])
def test_steps_are_bit_equal(length):
    module, before, after, _ = fused()
    x = torch.randn(length, 16)
    caches = [Cache(cache_spec(graph), length, 16) for graph in (before, after)]
    caches[1].table = caches[0].table
    split = length // 2
    for start, end in ((0, split), (split, length)):
        results = [
            cache.run(graph, module, x, start, end)
            for cache, graph in zip(caches, (before, after), strict=True)
        ]
        assert torch.equal(*results)
    for name, pages in caches[0].tensors.items():
        assert torch.equal(pages.nan_to_num(7.0), caches[1].tensors[name].nan_to_num(7.0)), name


@pytest.mark.parametrize(
    ("miss", "why"),
    [
        ("key of no rope", "query and key do not come from one rope"),
        ("two ropes", "query and key do not come from one rope"),
        ("read by others", "others read the rotated query or key, too"),
    ],
)
def test_near_misses_are_refused(miss, why):
    _, _, after, report = fused(miss)
    assert report.matches == 0
    assert [reason for _, reason in report.refused] == [why]
    assert not any(node.target is FUSED for node in after.graph.nodes)
    (call,) = (node for node in after.graph.nodes if node.target is PAGED)
    assert call.args[5] is not None, "the keys must still be stored"


def test_the_pipeline_leaves_it_out_on_the_cpu():
    captured = lift(Rotated(), torch.randn(5, 16))
    _, report = run_passes(captured)
    (own,) = (item for item in report.passes if item.name == "fuse_rope_store")
    assert (own.matches, own.status) == (0, "not for cpu")
