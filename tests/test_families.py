"""Twenty-one model families, each in every way a request can run: transformers' fp32 greedy tokens.

Quick runs take three families, `make test-all` takes all. What counts as transformers' answer is
the row alone: its own left-padded batches differ for some models.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from conftest import poison
from tiny_models import (
    FAMILIES,
    QUICK_FAMILIES,
    NativeTokens,
    has_clear_margin,
    left_padded,
    prompts,
    tiny_model,
)

import fastgen
from fastgen import Engine, SamplingParams

NUM_TOKENS = 48
BLOCK_SIZE = 16
# Within a block, one short of its end, at it, past it, at the end of two, and beyond every window;
# with 48 tokens more, 16 and 32 end exactly on a block.
LENGTHS = (5, 15, 16, 17, 32, 40)
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)


def family_params() -> list:
    return [
        pytest.param(name, marks=() if name in QUICK_FAMILIES else pytest.mark.slow)
        for name in FAMILIES
    ]


@dataclass
class Continuation:
    """What transformers makes of a prompt. noise: between its fp32 paths and fp64, absolute."""

    token_ids: list[int]
    logits: torch.Tensor  # [NUM_TOKENS, vocab]
    exact: torch.Tensor  # the same in fp64
    noise: float


class Family:
    """A family's models, and prompts of which transformers' answer is beyond doubt."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.plain = tiny_model(name)
        self.exact = copy.deepcopy(self.plain).double()
        self.exact.set_experts_implementation("eager")  # grouped products know no fp64
        picked = [self.pick(length) for length in LENGTHS]
        self.rows = [row for row, _ in picked]
        self.continuations = [continuation for _, continuation in picked]
        self.expected = [continuation.token_ids for continuation in self.continuations]

    def continuation(self, row: list[int]) -> Continuation:
        """Noise: the decoding loop, one forward over everything, and fp64 differ by that much."""
        out = self.plain.generate(
            torch.tensor([row]),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits, new = torch.cat(out.logits), slice(len(row) - 1, -1)
        with torch.no_grad():
            exact = self.exact(out.sequences).logits[0, new]
            at_once = self.plain(out.sequences).logits[0, new]
        noise = max((one - exact).abs().max() for one in (logits, at_once))
        return Continuation(out.sequences[0, len(row) :].tolist(), logits, exact, float(noise))

    def pick(self, length: int, prefix: list[int] | None = None) -> tuple[list[int], Continuation]:
        """A prompt (after `prefix`) whose tokens vary and are 20 times the noise from a tie."""
        for seed in range(60):
            row = [*(prefix or ()), *prompts(length, seed=seed)[0]]
            found = self.continuation(row)
            if has_clear_margin((found.logits,), found.noise) and len(set(found.token_ids)) > 8:
                return row, found
        raise AssertionError(f"{self.name}: every prompt comes near a tie or says little")


@contextlib.contextmanager
def engine_of(family: str, **fields) -> Iterator[Engine]:
    """An engine over a model of its own, with NaN in every freed block; all it makes is native."""
    with Engine(tiny_model(family), **fields) as engine:
        poison(engine.model)
        with NativeTokens(engine.model):
            yield engine


def answers(engine: Engine, rows: list[list[int]]) -> list[list[int]]:
    outputs = engine.generate(rows, GREEDY)
    assert [output.finish_reason for output in outputs] == ["length"] * len(rows)
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module", params=family_params())
def family(request) -> Family:
    return Family(request.param)


@pytest.fixture(scope="module")
def engine(family) -> Iterator[Engine]:
    """The family with default settings."""
    with engine_of(family.name) as engine:
        yield engine


# Tokens.


def test_rows_alone(family, engine):
    """By generate(), at and around block boundaries; the tokens of each vary."""
    for row, expected in zip(family.rows, family.expected, strict=True):
        with NativeTokens(engine.model, NUM_TOKENS):
            out = engine.model.generate(
                torch.tensor([row]), max_new_tokens=NUM_TOKENS, do_sample=False
            )
        assert out[0, len(row) :].tolist() == expected
        assert len(set(expected)) > 8


def test_a_left_padded_batch(family, engine):
    ids, mask = left_padded(family.rows)
    with NativeTokens(engine.model, NUM_TOKENS * len(ids)):
        out = engine.model.generate(
            ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False
        )
    assert out[:, ids.shape[1] :].tolist() == family.expected


def test_requests_without_padding(family, engine):
    with NativeTokens(engine.model, NUM_TOKENS * len(family.rows)):
        assert answers(engine, family.rows) == family.expected


@pytest.mark.parametrize("max_num_batched_tokens", [7, 16])
def test_prompts_in_chunks(family, max_num_batched_tokens):
    with engine_of(family.name, max_num_batched_tokens=max_num_batched_tokens) as engine:
        assert answers(engine, family.rows) == family.expected
        metrics = engine.metrics()
    assert metrics.engine_steps >= metrics.computed_tokens / max_num_batched_tokens


def test_preempted_requests(family, engine):
    """A pool for two of six requests at their full length."""
    num_blocks = 1 + 2 * -(-(max(LENGTHS) + NUM_TOKENS) // BLOCK_SIZE)
    per_block = fastgen.api.require(engine.model).compiled.spec.bytes_per_token * BLOCK_SIZE
    with engine_of(family.name, kv_cache_memory_bytes=num_blocks * per_block) as small:
        outputs = small.generate(family.rows, GREEDY)
        assert small.metrics().num_blocks == num_blocks - 1
    assert [output.token_ids for output in outputs] == family.expected
    assert sum(output.metrics.num_preemptions for output in outputs) > 0


def prefix_hits(metrics) -> int:
    """Prompt tokens that were found in the cache instead of being computed."""
    return metrics.prefix_cache_hit_tokens


def test_the_same_prompts_again(family, engine):
    """Of each prompt all full blocks hit, but for a block that holds its last token."""
    assert answers(engine, family.rows) == family.expected
    before = prefix_hits(engine.metrics())
    assert answers(engine, family.rows) == family.expected
    full_blocks = sum((length - 1) // BLOCK_SIZE for length in LENGTHS)
    assert prefix_hits(engine.metrics()) - before >= full_blocks * BLOCK_SIZE


def test_prompts_that_share_a_prefix(family, engine):
    """40 tokens: two blocks and a half, of which two can be shared."""
    (prefix,) = prompts(40, seed=99)
    picked = [family.pick(length, prefix) for length in (3, 9, 24)]
    rows = [row for row, _ in picked]
    before = prefix_hits(engine.metrics())
    first = answers(engine, rows[:1])
    others = answers(engine, rows[1:])
    assert first + others == [found.token_ids for _, found in picked]
    assert prefix_hits(engine.metrics()) - before >= 2 * 2 * BLOCK_SIZE


@pytest.mark.parametrize("length", [BLOCK_SIZE, 2 * BLOCK_SIZE])
def test_a_prompt_that_is_all_in_the_cache(family, engine, length):
    """Its last token is computed again: it alone tells what comes next."""
    index = LENGTHS.index(length)
    rows, expected = [family.rows[index]], [family.expected[index]]
    assert answers(engine, rows) == expected
    before = prefix_hits(engine.metrics())
    assert answers(engine, rows) == expected
    assert prefix_hits(engine.metrics()) - before >= length - BLOCK_SIZE
    out = engine.model.generate(torch.tensor(rows), max_new_tokens=NUM_TOKENS, do_sample=False)
    assert out[:, length:].tolist() == expected


def test_logits(family, engine):
    """What scales or caps all logits alike changes no greedy token, so it is looked for here.

    Error against fp64 <= 2 x (error of transformers in fp32 + eps x max).
    """
    eps = torch.finfo(torch.float32).eps
    for row, known in zip(family.rows[-2:], family.continuations[-2:], strict=True):
        with NativeTokens(engine.model, NUM_TOKENS):
            out = engine.model.generate(
                torch.tensor([row]),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        error = (torch.cat(out.logits) - known.exact).abs().max()
        assert error <= 2 * (known.noise + eps * known.exact.abs().max())


def test_random_lengths_compile_nothing(family, engine):
    optimized = fastgen.api.require(engine.model)
    compiled, counters = optimized.compiled, copy.deepcopy(torch._dynamo.utils.counters)
    generator = random.Random(0)
    params = SamplingParams(max_tokens=3, temperature=0.0)
    for _ in range(6):
        lengths = [generator.randrange(1, 100) for _ in range(generator.randrange(1, 8))]
        engine.generate(prompts(*lengths), params)
    assert optimized.compiled is compiled
    assert torch._dynamo.utils.counters == counters


# What was captured.


@dataclass
class Layers:
    """What the two layers' attention must be told; sizes are those of one KV cache entry."""

    windows: tuple[int, int] = (0, 0)
    scale: float = 0.25
    softcap: float = 0.0
    sinks: bool = False
    num_kv_heads: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    kind: str = "kv"


LAYERS = {
    "mistral": Layers(windows=(12, 12)),
    "gemma2": Layers(windows=(12, 0), scale=2**-0.5, softcap=1.5),
    "gemma3_text": Layers(windows=(12, 0), scale=2**-0.5),
    "gpt_neox": Layers(num_kv_heads=4),
    "granite": Layers(scale=0.4),
    "cohere2": Layers(windows=(12, 0)),
    "gpt2": Layers(num_kv_heads=4),
    "qwen2_moe": Layers(windows=(0, 12)),
    "gpt_oss": Layers(windows=(12, 0), sinks=True),
    "deepseek_v2": Layers(num_kv_heads=1, v_head_dim=8, kind="latent"),
    "deepseek_v3": Layers(num_kv_heads=1, v_head_dim=8, kind="latent"),
    "starcoder2": Layers(windows=(12, 12)),
}


def test_every_attention_is_told_everything(family, engine):
    expected = LAYERS.get(family.name, Layers())
    compiled = fastgen.api.require(engine.model).compiled
    layers = compiled.spec.layers
    assert [layer.window for layer in layers] == list(expected.windows)
    assert {(x.kind, x.num_kv_heads, x.head_dim, x.v_head_dim, x.dtype) for x in layers} == {
        (
            expected.kind,
            expected.num_kv_heads,
            expected.head_dim,
            expected.v_head_dim,
            torch.float32,
        )
    }
    calls = paged_attentions(family.plain)
    assert [window for _, window, _, _ in calls] == list(expected.windows)
    assert [scale for scale, _, _, _ in calls] == pytest.approx([expected.scale] * 2)
    assert [softcap for _, _, softcap, _ in calls] == [expected.softcap] * 2
    assert [sinks for _, _, _, sinks in calls] == [
        f"model.layers.{layer}.self_attn.sinks" if expected.sinks else None for layer in (0, 1)
    ]


def paged_attentions(model) -> list[tuple]:
    """scale, window, softcap and the parameter of the sinks of each paged attention."""
    graph, _ = fastgen.passes.run_passes(fastgen.capture.capture(model))
    return [
        (*settings[:3], graph.inputs[settings[3].name].target if settings[3] else None)
        for settings in (
            (*node.args[9:], *(0.0, None)[len(node.args) - 11 :])  # of latents neither of the two
            for node in graph.graph.nodes
            if node.target
            in (
                torch.ops.fastgen.paged_attention.default,
                torch.ops.fastgen.paged_latent_attention.default,
            )
        )
    ]


def test_every_pass_ran(family, engine):
    report = fastgen.explain(engine.model).report
    others = {item.name: item.status for item in report.passes if item.status != "applied"}
    assert others == {"fuse_rope_store": "not for cpu"}
    assert next(p.matches for p in report.passes if p.name == "insert_paged_cache") == 2
    latent = LAYERS.get(family.name, Layers()).kind == "latent"
    assert next(p.matches for p in report.passes if p.name == "cache_latent") == 2 * latent
    kernels = report.kernels[f"fastgen::paged_{'latent_' * latent}attention"]
    assert sum(entry["calls"] for entry in kernels.values()) == 2


# What makes a family special matters: without it the tokens would be others.

WITHOUT = {
    "mistral": {"window": {"sliding_window": None}},
    "gemma2": {
        "window": {"layer_types": ["full_attention"] * 2},
        "other-layer": {"layer_types": ["full_attention", "sliding_attention"]},
        "softcap": {"attn_logit_softcapping": None},
        "scale": {"query_pre_attn_scalar": 16},
    },
    "gemma3_text": {
        "window": {"layer_types": ["full_attention"] * 2},
        "scale": {"query_pre_attn_scalar": 16},
    },
    "gpt_neox": {"parallel": {"use_parallel_residual": False}},
    "granite": {
        "embedding": {"embedding_multiplier": 1.0},
        "attention": {"attention_multiplier": 0.25},
        "residual": {"residual_multiplier": 1.0},
    },
    "cohere2": {"window": {"layer_types": ["full_attention"] * 2}},
    "stablelm": {
        "partial-rope": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
            }
        },
        "qk-norm": {"qk_layernorm": False},
    },
    "mixtral": {"experts": {"num_experts_per_tok": 1}},
    "qwen3_moe": {"experts": {"num_experts_per_tok": 1}},
    "qwen2_moe": {
        "experts": {"num_experts_per_tok": 1},
        "window": {"use_sliding_window": False, "layer_types": ["full_attention"] * 2},
        "other-layer": {"layer_types": ["sliding_attention", "full_attention"]},
    },
    "gpt_oss": {
        "experts": {"num_experts_per_tok": 1},
        "window": {"layer_types": ["full_attention"] * 2},
        "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    },
    "deepseek_v2": {"rope": {"qk_rope_head_dim": 4}},
    "deepseek_v3": {"groups": {"n_group": 1}, "scaling": {"routed_scaling_factor": 1.0}},
    "smollm3": {"rope": {"no_rope_layers": [1, 1]}},
    "starcoder2": {"window": {"sliding_window": None}},
}


def without_params() -> list:
    return [
        pytest.param(
            name,
            fields,
            id=f"{name}-{feature}",
            marks=() if name in QUICK_FAMILIES else pytest.mark.slow,
        )
        for name, features in WITHOUT.items()
        for feature, fields in features.items()
    ]


def num_changed(family: str, model) -> int:
    """Of five prompts, those that transformers continues otherwise with this model."""
    rows, original = prompts(40, 40, 40, 40, 40), tiny_model(family)
    ids = torch.tensor(rows)
    one, other = (
        which.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)
        for which in (original, model)
    )
    return int((one != other).any(dim=1).sum())


@pytest.mark.parametrize(("name", "fields"), without_params())
def test_without_a_feature_the_tokens_are_others(name, fields):
    assert num_changed(name, tiny_model(name, **fields)) >= 4


def test_without_sinks_the_tokens_are_others():
    model = tiny_model("gpt_oss")
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)
    assert num_changed("gpt_oss", model) >= 4


@pytest.mark.parametrize("name", family_params())
def test_nothing_is_left_at_zero_or_one(name):
    """A bias of zero or a norm of one would hide that it is dropped."""
    model = tiny_model(name)
    for tensor_name, tensor in model.state_dict().items():
        if tensor.ndim == 1 or tensor_name.endswith("bias"):
            assert not ((tensor == 0) | (tensor == 1)).any(), tensor_name
