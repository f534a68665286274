"""Models that cache latents, from the engine's side: tokens, the returned cache, weights, sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import poison
from tiny_models import NativeTokens, greedy_alone, left_padded, tiny_model

import fastgen
from fastgen import Engine, SamplingParams
from fastgen.planning import Device, plan

pytestmark = pytest.mark.usefixtures("graphs_of_the_session")

NUM_TOKENS, BLOCK_SIZE = 20, 16
LENGTHS = (5, 15, 16, 17, 40)
RANK, ROPE = 16, 8
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
MODELS = {
    "deepseek_v3": ("deepseek_v3", {}),
    "plain-queries": ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}),
    "deepseek_v2": ("deepseek_v2", {}),
}


class Model:
    """A tiny model, prompts far from ties, and what transformers makes of each alone."""

    def __init__(self, name: str) -> None:
        family, fields = MODELS[name]
        self.plain = tiny_model(family, **fields)
        self.rows, self.expected = greedy_alone(self.plain, *LENGTHS, num_tokens=NUM_TOKENS)

    def engine(self, **fields) -> Engine:
        engine = Engine(copy.deepcopy(self.plain), **fields)
        poison(engine.model)
        return engine


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Model:
    return Model(request.param)


@pytest.fixture
def one() -> Model:
    return Model("deepseek_v3")


def tokens(engine: Engine, rows: list[list[int]]) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(rows, GREEDY)]


def test_tokens_in_every_way_a_request_runs(model):
    """Together, alone, again over the prefixes in the cache, and padded by generate()."""
    with model.engine() as engine, NativeTokens(engine.model, 15 * NUM_TOKENS):
        assert fastgen.explain(engine.model).report.kernels["fastgen::paged_latent_attention"]
        assert tokens(engine, model.rows) == model.expected
        for row, expected in zip(model.rows, model.expected, strict=True):
            assert tokens(engine, [row]) == [expected]
        assert engine.metrics().prefix_cache_hit_tokens > 0
        ids, mask = left_padded(model.rows)
        out = engine.model.generate(
            ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False
        )
        assert out[:, ids.shape[1] :].tolist() == model.expected


def test_tokens_of_chunked_and_preempted_requests(model):
    """A pool for one request at its full length and some more."""
    per_block = 2 * 4 * (RANK + ROPE) * BLOCK_SIZE
    with model.engine(max_num_batched_tokens=7, kv_cache_memory_bytes=7 * per_block) as engine:
        with NativeTokens(engine.model, len(LENGTHS) * NUM_TOKENS):
            outputs = engine.generate(model.rows, GREEDY)
        assert engine.metrics().num_blocks == 6
    assert [output.token_ids for output in outputs] == model.expected
    assert sum(output.metrics.num_preemptions for output in outputs) > 0


def test_the_returned_cache_is_transformers_own(model):
    """The latents and the rotated keys, within 64 roundings; what is hidden is zero."""
    ids, mask = left_padded(model.rows)
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 9,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    with model.engine() as engine, NativeTokens(engine.model):
        ours = engine.model.generate(ids, **settings)
    theirs = model.plain.generate(ids, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    visible = torch.cat([mask, mask.new_ones(len(mask), 8)], dim=1).bool()
    for layer, other in zip(
        ours.past_key_values.layers, theirs.past_key_values.layers, strict=True
    ):
        for got, expected, width in (
            (layer.keys, other.keys, RANK),
            (layer.values, other.values, ROPE),
        ):
            assert got.shape == expected.shape == (len(ids), 1, visible.shape[1], width)
            got, expected = got[:, 0], expected[:, 0]
            allowed = 64 * torch.finfo(got.dtype).eps * float(expected[visible].abs().max())
            assert (got[visible] - expected[visible]).abs().max() <= allowed
            assert not got[~visible].any()


def test_without_the_pass_a_returned_cache_is_left_to_transformers(one):
    """The engine then keeps expanded heads, of which no latent can be made."""
    with one.engine(passes_off=("cache_latent",)) as engine:
        assert {layer.kind for layer in fastgen.explain(engine.model).spec.layers} == {"kv"}
        ids = torch.tensor(one.rows[:1])
        with NativeTokens(engine.model):
            out = engine.model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)
        assert out[0, ids.shape[1] :].tolist() == one.expected[0]
        out = engine.model.generate(
            ids, max_new_tokens=NUM_TOKENS, do_sample=False, return_dict_in_generate=True
        )
        assert out.sequences[0, ids.shape[1] :].tolist() == one.expected[0]
        assert out.past_key_values.layers[0].keys.shape[-1] == RANK
        (reason,) = fastgen.explain(engine.model).fallbacks
        assert reason == "transformers' cache holds latents, the engine's does not"


@pytest.mark.parametrize("part", ["keys", "values"])
def test_the_weight_of_the_latents_is_followed(one, part):
    """Changed in place, as an optimizer does: the next tokens are the changed model's."""
    with one.engine() as engine:
        assert tokens(engine, one.rows) == one.expected
        rows = slice(0, 8) if part == "keys" else slice(8, None)
        for changed in (engine.model, one.plain):
            with torch.no_grad():
                weight = changed.model.layers[0].self_attn.kv_b_proj.weight
                weight.view(4, 20, RANK)[:, rows].mul_(-1)
        answers = [
            one.plain.generate(torch.tensor([row]), max_new_tokens=NUM_TOKENS, do_sample=False)
            for row in one.rows
        ]
        expected = [
            answer[0, len(row) :].tolist() for answer, row in zip(answers, one.rows, strict=True)
        ]
        assert expected != one.expected
        assert tokens(engine, one.rows) == expected


def test_released_weights_leave_the_weight_of_the_latents():
    """It is read as it is: neither packed nor released."""
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16, kv_lora_rank=32)
    ids = torch.arange(2, 32)[None]
    with Engine(model, release_weights=True, pack=True) as engine:
        explained = fastgen.explain(model)
        if not explained.released_bytes:
            pytest.skip("no weight can be packed on this machine")
        weight = model.model.layers[0].self_attn.kv_b_proj.weight
        assert type(weight) is torch.nn.Parameter
        assert explained.report.kernels["fastgen::paged_latent_attention"]
        with NativeTokens(engine.model):
            model.generate(ids, max_new_tokens=4, do_sample=False)


def test_adapters_on_the_weight_of_the_latents_are_refused_by_name(one):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(one.plain), config).eval()
    ids = torch.tensor(one.rows[-1:])
    expected = model.generate(input_ids=ids, max_new_tokens=NUM_TOKENS, do_sample=False)
    fastgen.optimize(model)
    with NativeTokens(model):
        out = model.generate(input_ids=ids, max_new_tokens=NUM_TOKENS, do_sample=False)
    assert torch.equal(out, expected)
    text = str(fastgen.explain(model))
    assert "cache_latent: 0 (applied)" in text
    assert "keys and values are computed from more than one linear" in text
    fastgen.restore(model)


def test_sizes_show_the_smaller_cache(one):
    """By hand: 2 layers of 16 + 8 numbers in fp32, not of 4 heads of 16 and 12."""
    planned = plan(one.plain.config, dtype=torch.float32, max_model_len=64)
    with one.engine() as engine:
        explained = fastgen.explain(engine.model)
    bytes_per_token = 2 * 4 * (RANK + ROPE)
    assert explained.spec.bytes_per_token == planned.kv_cache.bytes_per_token == bytes_per_token
    assert planned.kv_cache.layers[0]["kind"] == "latent"
    on_gpu = plan(one.plain.config, dtype=torch.float32, device=Device("a GPU", 1e3, 1e2))
    assert on_gpu.kv_cache.bytes_per_token == 2 * 4 * 4 * (16 + 12)
    assert planned.kv_cache.sequence_bytes == 64 * bytes_per_token
    assert "192 bytes per token (float32, a latent of 16 and a key of 8 for all heads)" in str(
        explained
    )
