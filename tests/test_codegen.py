"""codegen="inductor" computes what transformers does, compiled once, in the cache it was given."""

import os
import shutil

import pytest
import torch
import torch._inductor.graph
from capture_helpers import assert_untouched, photograph
from conftest import poison
from tiny_models import NativeTokens, greedy_alone, prompts, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen
from fastgen.engine.batch import ForwardBatch
from fastgen.engine.kv_cache import KVCache

COMPILER = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"Inductor needs a C++ compiler, {COMPILER} is missing"
)
LENGTHS = (1, 2, 15, 16, 17, 33, 100)


def inductor_model(family: str, **fields):
    """A tiny model whose prompts come in chunks, some of which want no logits."""
    model = fastgen.optimize(
        tiny_model(family, **fields), codegen="inductor", max_num_batched_tokens=24
    )
    poison(model)
    return model


def assert_greedy(plain, fast, *lengths: int) -> None:
    """Alone and together, the tokens are transformers'."""
    rows, expected = greedy_alone(plain, *lengths, num_tokens=20)
    greedy = fastgen.SamplingParams(max_tokens=20, temperature=0.0)
    with NativeTokens(fast, at_least=40 * len(rows)):
        alone = [fastgen.Engine(fast).generate([row], greedy)[0].token_ids for row in rows]
        together = fastgen.Engine(fast).generate(rows, greedy)
    assert [list(ids) for ids in alone] == expected
    assert [list(output.token_ids) for output in together] == expected


class _CachesSeen(TorchDispatchMode):
    """Where the caches lie that attention is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith("paged_attention"):
            self.seen += [args[3].data_ptr(), args[4].data_ptr()]
        return func(*args, **(kwargs or {}))


@needs_compiler
def test_llama(monkeypatch):
    plain, fast = tiny_model("llama"), inductor_model("llama")
    optimized = fastgen.api.require(fast)
    assert "codegen       inductor" in str(fastgen.explain(fast))
    assert optimized.compiled.report.facts["programs"] == []

    def compiles(*_, **__):
        raise AssertionError("compiled again")

    monkeypatch.setattr(torch._inductor, "compile", compiles)
    monkeypatch.setattr(torch._inductor.graph.GraphLowering, "compile_to_module", compiles)
    assert_greedy(plain, fast, *LENGTHS)

    # Other values in the same memory, and other memory: the next tokens are computed with them.
    for model in (plain, fast):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(-1)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
    assert_greedy(plain, fast, 17)

    cache = KVCache(optimized.compiled.spec, 4, 16, torch.device("cpu"))
    positions = torch.arange(5)
    batch = ForwardBatch(
        input_ids=torch.tensor(prompts(5)[0]),
        positions=positions,
        slot_mapping=16 + positions,
        query_start_loc=torch.tensor([0, 5], dtype=torch.int32),
        seq_lens=torch.tensor([5], dtype=torch.int32),
        block_table=torch.tensor([[1, 2]], dtype=torch.int32),
        logits_indices=torch.tensor([4]),
    )
    with torch.inference_mode(), _CachesSeen() as caches:
        optimized.compiled(batch, cache)
    given = [cache.tensors[f"{role}:{layer}"] for layer in range(2) for role in ("key", "value")]
    assert caches.seen == [tensor.data_ptr() for tensor in given]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "qwen2", "gpt_oss"])
def test_families(family):
    assert_greedy(tiny_model(family), inductor_model(family), *LENGTHS)


@needs_compiler
@pytest.mark.slow
def test_packed_weights():
    """bf16: within rounding of what the graph computes directly."""
    bf16 = {"dtype": torch.bfloat16}
    direct, fast = fastgen.optimize(tiny_model("llama", **bf16)), inductor_model("llama", **bf16)
    ids = torch.tensor(prompts(33))
    step = {"max_new_tokens": 1, "do_sample": False}
    step |= {"return_dict_in_generate": True, "output_logits": True}
    expected, got = (model.generate(ids, **step).logits[0] for model in (direct, fast))
    exact = tiny_model("llama").double().generate(ids, **step).logits[0]
    eps = torch.finfo(torch.bfloat16).eps
    allowed = 2 * ((expected - exact).abs().max() + eps * exact.abs().max())
    assert (got - exact).abs().max() <= allowed


def test_an_error_of_inductors_names_the_way_out(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no such lowering\nat great length")

    monkeypatch.setattr(torch._inductor, "compile", fails)
    model = tiny_model("llama")
    before = photograph(model)
    with pytest.raises(
        fastgen.UnsupportedModelError,
        match=r'cannot compile the graph \(RuntimeError: no such lowering\); use codegen="direct"',
    ):
        fastgen.optimize(model, codegen="inductor")
    assert_untouched(model, before)


def test_weights_in_onednns_layout_are_refused(monkeypatch):
    monkeypatch.setattr("fastgen.kernels.packing.why_not_tiles", lambda weight: "not here")
    with pytest.raises(fastgen.UnsupportedModelError, match='use codegen="direct" or pack=False'):
        fastgen.optimize(tiny_model("llama", dtype=torch.bfloat16), codegen="inductor", pack=True)
