"""insert_paged_cache: attention over a cache that is an input, and the spec of that cache."""

from __future__ import annotations

import pytest
import torch
from fastgen.kernels import attention
from fastgen.passes import CacheSpec, InputSpec, LayerCache, run_passes
from fastgen.passes.insert_paged_cache import cache_spec, insert_paged_cache
from fastgen.passes.pipeline import check_form, check_values
from test_graph import Attention, evaluate, lift
from torch import nn

from fastgen.compiled import choose_kernels

METADATA = ["slot_mapping", "block_table", "query_start_loc", "seq_lens"]
PAGED = torch.ops.fastgen.paged_attention.default


class Layer(nn.Module):
    """One attention with everything the op can be asked for."""

    def __init__(
        self,
        layer_idx=0,
        heads=(4, 2),
        head_dim=4,
        v_head_dim=6,
        window=0,
        softcap=0.0,
        sinks=False,
    ) -> None:
        super().__init__()
        (num_heads, num_kv_heads), self.layer_idx = heads, layer_idx
        self.q = nn.Linear(16, num_heads * head_dim)
        self.k = nn.Linear(16, num_kv_heads * head_dim)
        self.v = nn.Linear(16, num_kv_heads * v_head_dim)
        self.o = nn.Linear(num_heads * v_head_dim, 16)
        self.sinks = nn.Parameter(torch.randn(num_heads)) if sinks else None
        self.heads, self.window, self.softcap = heads, window, softcap

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        num_heads, num_kv_heads = self.heads
        query = self.q(x).unflatten(-1, (num_heads, -1))
        key = self.k(x).unflatten(-1, (num_kv_heads, -1))
        value = self.v(x).unflatten(-1, (num_kv_heads, -1))
        sinks, settings = self.sinks, (0.3, self.window, self.softcap)
        output = attention(query, key, value, mask, *settings, sinks, self.layer_idx)
        return x + self.o(output.flatten(-2))


class Stack(nn.Module):
    """Three layers that differ in all that a spec tells."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [
                Layer(0),
                Layer(1, heads=(7, 1), head_dim=8, v_head_dim=8, window=5),
                Layer(2, heads=(3, 3), window=9, softcap=2.0, sinks=True),
            ]
        )
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def paged(module, dtype=torch.float32):
    captured = lift(module, torch.randn(5, 16).to(dtype))
    before = captured.copy()
    report = insert_paged_cache(captured)
    captured.graph.lint()
    return before, captured, report


class Cache:
    """Tensors for a spec, one sequence in scattered blocks, NaN where nothing was written."""

    def __init__(self, spec: CacheSpec, length: int, block_size: int) -> None:
        self.block_size, num_blocks = block_size, 4 - (-length // block_size)
        self.table = torch.randperm(num_blocks - 1)[: -(-length // block_size)] + 1
        self.tensors = {}
        for index, layer in enumerate(spec.layers):
            shape = (num_blocks, layer.num_kv_heads, block_size)
            for role, width in layer.tensors.items():
                self.tensors[f"{role}:{index}"] = torch.full(
                    (*shape, width), torch.nan, dtype=layer.dtype
                )

    def batch(self, start: int, end: int) -> list[torch.Tensor]:
        """The step that computes the tokens [start, end)."""
        place = torch.arange(start, end)
        blocks = self.table[place // self.block_size]
        return [
            blocks * self.block_size + place % self.block_size,
            self.table[None].int(),
            torch.tensor([0, end - start], dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32),
        ]

    def run(self, captured, module, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        caches = [
            self.tensors[spec.target] for spec in captured.inputs.values() if spec.kind == "cache"
        ]
        return evaluate(captured, module, x[start:end], *self.batch(start, end), *caches)


def test_every_attention_becomes_a_paged_one():
    _, after, report = paged(Stack())
    assert (report.matches, report.refused) == (3, [])
    called = [node.target for node in after.graph.nodes if node.op == "call_function"]
    assert called.count(PAGED) == 3
    assert torch.ops.fastgen.attention.default not in called


def test_metadata_and_caches_become_the_last_inputs_in_order():
    before, after, _ = paged(Stack())
    old = list(before.inputs.items())
    assert list(after.inputs.items())[: len(old)] == old
    assert list(after.inputs.values())[len(old) :] == [
        *(InputSpec("batch", name) for name in METADATA),
        *(InputSpec("cache", f"{role}:{i}") for i in range(3) for role in ("key", "value")),
    ]
    assert list(after.inputs) == [node.name for node in after.placeholders()]
    check_form(after)


def test_each_call_reads_its_own_cache_and_the_shared_metadata():
    _, after, _ = paged(Stack())
    calls = [node for node in after.graph.nodes if node.target is PAGED]
    for index, node in enumerate(calls):
        meaning = [after.inputs[arg.name] for arg in node.args[3:9]]
        assert meaning == [
            InputSpec("cache", f"key:{index}"),
            InputSpec("cache", f"value:{index}"),
            *(InputSpec("batch", name) for name in METADATA),
        ]
    sinks = after.placeholder("parameter", "layers.2.sinks")
    assert [node.args[9:] for node in calls] == [
        (0.3, 0, 0.0, None),
        (0.3, 5, 0.0, None),
        (0.3, 9, 2.0, sinks),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_spec_is_read_from_the_keys_and_values(dtype):
    _, after, _ = paged(Stack(dtype), dtype)
    spec = cache_spec(after)
    assert spec == CacheSpec(
        (
            LayerCache("kv", 2, 4, 6, dtype, 0),
            LayerCache("kv", 1, 8, 8, dtype, 5),
            LayerCache("kv", 3, 4, 6, dtype, 9),
        ),
        entries=(0, 1, 2),
    )
    assert [layer.layout for layer in spec.layers] == ["canonical"] * 3
    assert all(type(layer.head_dim) is int for layer in spec.layers)
    assert spec.layers[0].bytes_per_token == 2 * (4 + 6) * dtype.itemsize
    assert spec.bytes_per_token == (2 * 10 + 16 + 3 * 10) * dtype.itemsize


def test_sizes_that_may_differ_are_symbols():
    """A block size or a pool size that were baked in would be a compilation per size."""
    _, after, _ = paged(Stack())
    for node in after.placeholders():
        spec, value = after.inputs[node.name], node.meta["val"]
        assert isinstance(value, torch._subclasses.FakeTensor)
        dynamic = [isinstance(size, torch.SymInt) for size in value.shape]
        if spec.kind == "cache":
            assert dynamic == [True, False, True, False]
        elif spec.target in METADATA:
            assert all(dynamic)
    numbers = {
        str(size)
        for node in after.placeholders()
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
    }
    assert len(numbers) > 8, "sizes that are free must not be tied to each other"
    dtypes = {name: after.placeholder("batch", name).meta["val"].dtype for name in METADATA}
    assert dtypes.pop("slot_mapping") == torch.int64
    assert set(dtypes.values()) == {torch.int32}


def test_the_graph_checks_on_fake_tensors():
    before, after, _ = paged(Stack())
    check_values(before, after)


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("length", [2, 16, 33])
def test_one_step_equals_the_attention_it_replaces_bit_for_bit(length, block_size):
    module, x = Stack(), torch.randn(length, 16)
    before, after, _ = paged(module)
    cache = Cache(cache_spec(after), length, block_size)
    assert torch.equal(cache.run(after, module, x, 0, length), evaluate(before, module, x))


@pytest.mark.parametrize("steps", [[1] * 20, [5, 1, 1, 10, 3], [16, 4]], ids=str)
def test_steps_equal_the_whole(steps):
    """Error against fp64 <= 2 x (error of one fp32 step + eps x max)."""
    module, x = Stack(), torch.randn(20, 16)
    before, after, _ = paged(module)
    cache = Cache(cache_spec(after), 20, block_size=4)
    outputs, start = [], 0
    for num_tokens in steps:
        outputs.append(cache.run(after, module, x, start, start + num_tokens))
        start += num_tokens
    plain = evaluate(before, module, x)
    exact = exact_stack(module, x)
    allowed = 2 * ((plain - exact).abs().max() + torch.finfo(x.dtype).eps * exact.abs().max())
    assert (torch.cat(outputs) - exact).abs().max() <= allowed


def exact_stack(module, x):
    """The stack in fp64; the op computes in fp32 whatever it is given, so it is written out."""
    x = x.double()
    for layer in module.layers:
        num_heads, num_kv_heads = layer.heads
        query, key, value = (
            (x @ linear.weight.double().T + linear.bias.double()).unflatten(-1, (heads, -1))
            for linear, heads in (
                (layer.q, num_heads),
                (layer.k, num_kv_heads),
                (layer.v, num_kv_heads),
            )
        )
        key, value = (t.repeat_interleave(num_heads // num_kv_heads, 1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * 0.3
        if layer.softcap:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
        hidden = (distance < 0) | (distance >= (layer.window or len(x)))
        weights = scores.masked_fill(hidden, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if layer.sinks is not None:
            total = total + layer.sinks.double().exp()[:, None, None]
        output = torch.einsum("hqk,khd->qhd", weights / total, value).flatten(-2)
        x = x + output @ layer.o.weight.double().T + layer.o.bias.double()
    return x.detach()


def test_the_cache_inputs_themselves_are_written():
    module, x = Stack(), torch.randn(7, 16)
    _, after, _ = paged(module)
    cache = Cache(cache_spec(after), 7, block_size=4)
    cache.run(after, module, x, 0, 7)
    first = after.placeholder("cache", "key:0")
    for user in first.users:
        assert user.target is PAGED, "a view of the cache would be cloned by a compiler"
    key = module.layers[0].k(x).unflatten(-1, (2, 4))
    stored = cache.tensors["key:0"][cache.table].transpose(1, 2).flatten(0, 1)[:7]
    assert torch.equal(stored, key.detach())


def test_a_second_run_matches_nothing():
    _, after, _ = paged(Stack())
    inputs, text = dict(after.inputs), str(after.graph)
    again = insert_paged_cache(after)
    assert (again.matches, again.refused) == (0, [])
    assert (after.inputs, str(after.graph)) == (inputs, text)


def test_a_graph_without_attention_gets_no_inputs():
    class Projection(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    before, after, report = paged(Projection(16, 16))
    assert report.matches == 0
    assert after.inputs == before.inputs
    assert cache_spec(after) == CacheSpec(())


class Twice(nn.Module):
    def __init__(self, *layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(layer_idx) for layer_idx in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("layers", [(0, 0), (0, 1, 0), (3, 3, 3)], ids=str)
def test_two_attentions_of_one_layer_are_refused(layers):
    with pytest.raises(ValueError, match="each layer may have one attention"):
        paged(Twice(*layers))


def test_the_pipeline_refuses_them_too_and_leaves_the_graph():
    captured = lift(Twice(0, 0), torch.randn(5, 16))
    before = str(captured.graph), dict(captured.inputs)
    with pytest.raises(ValueError, match=r"layers \[0, 0\]"):
        run_passes(captured)
    assert (str(captured.graph), dict(captured.inputs)) == before


def test_caches_are_numbered_in_graph_order_whatever_the_layers_are_called():
    _, after, _ = paged(Twice(7, 3))
    calls = [node for node in after.graph.nodes if node.target is PAGED]
    assert [after.inputs[node.args[3].name].target for node in calls] == ["key:0", "key:1"]
    assert len(cache_spec(after).layers) == 2


def test_a_mask_is_never_dropped():
    """A mask tensor that capture did not resolve means something; the paged op cannot carry it."""
    captured = lift(Layer(), torch.randn(5, 16), torch.ones(1, 1, 5, 5) > 0)
    assert any(spec.target == "mask" for spec in captured.inputs.values())
    with pytest.raises(ValueError, match="mask"):
        insert_paged_cache(captured)


class Biased(Layer):
    """Chunks and ALiBi: arguments that most attention nodes do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, 5.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [linear(x).unflatten(-1, (n, -1)) for linear, n in ((self.q, 4), (self.k, 2))]
        value = self.v(x).unflatten(-1, (2, -1))
        output = attention(*heads, value, None, 0.3, 0, 0.0, None, 0, 6, self.slopes)
        return self.o(output.flatten(-2))


def test_chunks_and_slopes_are_carried_over():
    torch.manual_seed(0)
    module, x = Biased(), torch.randn(20, 16)
    before, after, _ = paged(module)
    (layer,) = cache_spec(after).layers
    assert (layer.chunk, layer.alibi, layer.counts_places(20)) == (6, True, True)
    choose_kernels(lowered := after.copy())
    assert all(node.target is not PAGED for node in lowered.graph.nodes)
    cache = Cache(cache_spec(after), 20, block_size=16)
    parts = [cache.run(lowered, module, x, *span) for span in ((0, 7), (7, 8), (8, 20))]
    torch.testing.assert_close(torch.cat(parts), evaluate(before, module, x))


def test_layers_without_either_count_no_places():
    _, after, _ = paged(Stack())
    assert [layer.counts_places(20) for layer in cache_spec(after).layers] == [False, True, True]
    assert not any(layer.chunk or layer.alibi for layer in cache_spec(after).layers)


def test_planted_wrong_window_is_seen():
    module, x = Stack(), torch.randn(20, 16)
    before, after, _ = paged(module)
    call = [node for node in after.graph.nodes if node.target is PAGED][1]
    assert call.args[10] == 5
    call.args = (*call.args[:10], 6, *call.args[11:])
    cache = Cache(cache_spec(after), 20, block_size=4)
    assert cache_spec(after).layers[1].window == 6
    assert not torch.equal(cache.run(after, module, x, 0, 20), evaluate(before, module, x))
