"""cache_latent: attention whose keys and values are made from a latent, and what looks like it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastgen.kernels import attention
from fastgen.passes import LayerCache, run_passes
from fastgen.passes.cache_latent import cache_latent
from fastgen.passes.canonicalize import canonicalize
from fastgen.passes.insert_paged_cache import cache_spec, insert_paged_cache
from fastgen.passes.pipeline import PASSES, check_form, check_values
from pass_helpers import captured_family, count, fuse_family
from test_graph import evaluate, lift
from test_insert_paged_cache import Cache
from torch import nn

LATENT = torch.ops.fastgen.latent_attention.default
ATTENTION = torch.ops.fastgen.attention.default
HEADS, RANK, NOPE, ROPE, V = 4, 12, 6, 2, 5


class Latent(nn.Module):
    """Latent attention as transformers' models write it; `changes` are of one thing each."""

    def __init__(self, changes: str = "", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.changes = changes
        features = HEADS * (NOPE + V)
        self.q = nn.Linear(16, HEADS * (NOPE + ROPE))
        self.kv_a = nn.Linear(16, RANK + ROPE)
        self.kv_b = nn.Linear(RANK, features, bias=changes == "bias")
        self.more = nn.Linear(RANK, features, bias=False)
        self.to(dtype)

    def key(self, k_nope: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        if self.changes == "concatenated":
            return torch.cat((k_nope, k_rope), dim=-1)
        if self.changes == "rope first":
            return torch.cat((k_rope, k_nope), dim=-1)
        if self.changes == "scaled keys":
            k_nope = k_nope * 2
        key = k_nope.new_empty(*k_nope.shape[:-1], NOPE + ROPE)
        key[..., :NOPE].copy_(k_nope)
        if self.changes == "half a key":
            key[..., NOPE + 1 :].copy_(k_rope[..., 1:])
        else:
            key[..., NOPE:].copy_(k_rope)
        return key

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changes, x = self.changes, x[None]
        latent, k_rope = torch.split(self.kv_a(x), [RANK, ROPE], dim=-1)
        latent, k_rope = latent.unsqueeze(1).sigmoid(), k_rope.unsqueeze(1).tanh()
        heads = self.kv_b(latent)
        if changes == "adapter":
            heads = heads + self.more(latent)
        heads = heads.view(1, x.shape[1], -1, NOPE + V).transpose(1, 2)
        if changes == "values first":
            value, k_nope = torch.split(heads, [V, NOPE], dim=-1)
        else:
            k_nope, value = torch.split(heads, [NOPE, V], dim=-1)
        if changes == "rope by head":
            k_rope = (k_rope * torch.arange(1, 5, device=x.device).view(1, 4, 1, 1)).to(x.dtype)
        if changes == "fewer key heads":
            k_nope, value = k_nope[:, :2], value[:, :2]
        k_rope = k_rope.expand(-1, k_nope.shape[1], -1, -1)
        key = self.key(k_nope, k_rope)
        if changes == "written latent":
            latent.mul_(2)
        query = self.q(x).view(1, x.shape[1], HEADS, -1).transpose(1, 2)
        if changes == "wide query":
            query = query.float()
        settings = (0.3, 3 if changes == "window" else 0, 2.0 if changes == "softcap" else 0.0)
        sinks = self.q.bias[:HEADS] if changes == "sinks" else None
        rows = (part[0].transpose(0, 1) for part in (query, key, value))
        output = attention(*rows, None, *settings, sinks, 0)
        return output.flatten(1)


def rewritten(module: nn.Module, dtype: torch.dtype = torch.float32):
    before = lift(module, torch.randn(5, 16).to(dtype))
    canonicalize(before)
    after = before.copy()
    report = cache_latent(after)
    check_form(after)
    check_values(before, after)
    return before, after, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("changes", ["", "concatenated", "window"], ids=lambda x: x or "copied")
def test_it_becomes_attention_over_latents(changes, dtype):
    module = Latent(changes, dtype)
    before, after, report = rewritten(module, dtype)
    assert (report.matches, report.refused) == (1, [])
    assert (count(after, LATENT), count(after, ATTENTION)) == (1, 0)
    targets = {str(node.target) for node in after.graph.nodes}
    assert not {"aten.copy_.default", "aten.new_empty.default"} & targets
    assert count(after, torch.ops.aten.linear.default) == 2  # the third is the op's weight
    x = torch.randn(13, 16).to(dtype)
    assert torch.equal(evaluate(after, module, x), evaluate(before, module, x))
    assert cache_latent(after).matches == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ("bias", "the linear of keys and values has a bias"),
        ("adapter", "keys and values are computed from more than one linear"),
        ("values first", "keys and values are not the two parts of one linear's heads"),
        ("rope first", "the first part of the keys are no part of a linear's heads"),
        ("scaled keys", "the first part of the keys are no part of a linear's heads"),
        ("half a key", "the keys are not two parts, one beside the other"),
        ("rope by head", "the rest of the keys is not one vector for all heads"),
        ("fewer key heads", "the values are no part of a linear's heads"),
        ("softcap", "softcap"),
        ("sinks", "sinks"),
    ],
)
def test_what_looks_like_it_is_refused(changes, why):
    before, after, report = rewritten(Latent(changes))
    assert report.matches == 0
    assert report.refused == [("attention", why)]
    assert str(after.graph) == str(before.graph)


def test_a_latent_that_is_written_before_it_is_read_is_refused():
    _, after, report = rewritten(Latent("written latent"))
    assert count(after, ATTENTION) == 1
    ((_, why),) = report.refused
    assert "writes in place between linear" in why


def test_several_dtypes_are_refused():
    _, _, report = rewritten(Latent("wide query", torch.bfloat16), torch.bfloat16)
    ((_, why),) = report.refused
    assert why == "queries, keys, latents and weight are of several dtypes (bfloat16, float32)"


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_of_other_attention_nothing_is_said(family):
    _, captured = captured_family(family, torch.float32)
    report = cache_latent(captured)
    assert (report.matches, report.refused) == (0, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "family",
    [
        "deepseek_v3",
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in ("deepseek_v2", "minicpm3", "youtu", "glm4_moe_lite", "axk1")
        ),
    ],
)
def test_families(family, dtype):
    _, after, report = fuse_family(cache_latent, family, dtype)
    assert (report.matches, report.refused) == (2, [])
    assert count(after, LATENT) == 2


def test_without_the_pass_the_cache_is_of_heads():
    _, captured = captured_family("deepseek_v3", torch.float32)
    specs = [cache_spec(run_passes(captured, off)[0]) for off in ((), ("cache_latent",))]
    latent, heads = (spec.layers[0] for spec in specs)
    assert latent == LayerCache("latent", 1, 16, 8, torch.float32, 0)
    assert heads == LayerCache("kv", 4, 16, 16, torch.float32, 0)
    assert [spec.bytes_per_token for spec in specs] == [2 * 4 * (16 + 8), 2 * 4 * 4 * (16 + 16)]
    assert latent.tensors == {"latent": 24}


def test_it_is_for_the_cpu_alone():
    item = next(item for item in PASSES if item.run is cache_latent)
    assert item.runs_on(torch.device("cpu"))
    assert not item.runs_on(torch.device("cuda"))


@pytest.mark.parametrize("steps", [[1] * 20, [5, 1, 1, 10, 3], [20]], ids=str)
def test_steps_over_pages_equal_the_whole(steps):
    """Error against fp64 <= 2 x (error of the attention that was replaced + eps x max)."""
    module, x = Latent(), torch.randn(20, 16)
    before, after, _ = rewritten(module)
    insert_paged_cache(after)
    check_form(after)
    spec = cache_spec(after)
    assert [after.inputs[node.name].target for node in after.placeholders()][-1] == "latent:0"
    cache = Cache(spec, 20, block_size=4)
    outputs, start = [], 0
    for num_tokens in steps:
        outputs.append(cache.run(after, module, x, start, start + num_tokens))
        start += num_tokens
    exact, plain = exact_latent(module, x), evaluate(before, module, x)
    allowed = 2 * ((plain - exact).abs().max() + torch.finfo(x.dtype).eps * exact.abs().max())
    assert (torch.cat(outputs) - exact).abs().max() <= allowed


def exact_latent(module: Latent, x: torch.Tensor) -> torch.Tensor:
    """The module in fp64, written out."""
    x = x.double()
    weights = {name: parameter.double() for name, parameter in module.named_parameters()}
    latent, k_rope = F.linear(x, weights["kv_a.weight"], weights["kv_a.bias"]).split(
        [RANK, ROPE], -1
    )
    heads = F.linear(latent.sigmoid(), weights["kv_b.weight"]).unflatten(-1, (HEADS, -1))
    key = torch.cat((heads[..., :NOPE], k_rope.tanh()[:, None].expand(-1, HEADS, -1)), -1)
    query = F.linear(x, weights["q.weight"], weights["q.bias"]).unflatten(-1, (HEADS, -1))
    scores = torch.einsum("qhd,khd->hqk", query, key) * 0.3
    hidden = torch.ones(len(x), len(x)).triu(1) > 0
    output = torch.einsum(
        "hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), heads[..., NOPE:]
    )
    return output.flatten(1).detach()
