"""Plans from configurations alone, next to the models that are made of them."""

import json

import pytest
import torch
import transformers
from tiny_models import FAMILIES, VOCAB, WINDOW, prompts, tiny_model
from torch import fx

import fastgen
from fastgen import costs
from fastgen.cli.models import demo_model_dir
from fastgen.engine.kv_cache import block_bytes
from fastgen.planning import DEVICES, Device

QUICK = ("llama", "gemma2", "gpt2", "gpt_oss", "deepseek_v3")
DEVICE = Device("a test's", read_gb_per_s=1.0, tflop_per_s=1e-3, packs=True)
# A token's way through the tiny Llama's two layers, without the head.
BODY, HEAD = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96), 64 * VOCAB


@pytest.fixture(scope="module", name="config")
def config_fixture():
    return tiny_model("llama").config


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES],
)
def test_a_plan_is_what_the_model_takes(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    plan = fastgen.plan(model.config, dtype=torch.bfloat16, pack=True)
    assert plan.weights.parameter_bytes == sum(weight.nbytes for weight in model.parameters())
    assert plan.weights.parameters == sum(weight.numel() for weight in model.parameters())
    assert plan.weights.embedding_bytes == model.get_input_embeddings().weight.nbytes
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert plan.weights.tied_head == tied
    fastgen.optimize(model, pack=True)
    compiled = fastgen.api.require(model).compiled
    fastgen.restore(model)
    assert plan.kv_cache.bytes_per_token * 32 == block_bytes(compiled.spec, 32)
    assert plan.weights.packed_bytes == compiled.report.facts["packed_bytes"]
    kept = [layer for layer in plan.kv_cache.layers for _ in range(layer["count"])]
    assert sorted(layer["window"] for layer in kept) == sorted(
        layer.window for layer in compiled.spec.layers
    )


class _Peak(fx.Interpreter):
    """Runs a graph and notes the most memory that its values held at once, inputs aside."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.peak = 0
        self.inputs: set[int] = set()

    def run_node(self, n: fx.Node):
        result = super().run_node(n)
        if n.op == "placeholder":
            self.inputs.add(result.untyped_storage().data_ptr())
            return result
        held = {}
        for value in (*self.env.values(), result):
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, torch.Tensor):
                    storage = each.untyped_storage()
                    held[storage.data_ptr()] = storage.nbytes()
        now = sum(nbytes for pointer, nbytes in held.items() if pointer not in self.inputs)
        self.peak = max(self.peak, now)
        return result


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_activations_are_what_a_step_holds(family):
    model, num_tokens = tiny_model(family), 40
    model.generation_config.eos_token_id = None
    plan = fastgen.plan(
        model.config, dtype=torch.float32, max_num_batched_tokens=num_tokens, max_num_seqs=1
    )
    fastgen.optimize(model)
    compiled = fastgen.api.require(model).compiled
    interpreter = _Peak(compiled._forward.__self__)
    compiled._forward = interpreter.run
    with fastgen.Engine(model) as engine:
        params = fastgen.SamplingParams(max_tokens=1, temperature=0.0)
        engine.generate(prompts(num_tokens), params)
    fastgen.restore(model)
    assert plan.activation_bytes == interpreter.peak


def test_what_fits_is_what_the_engine_takes(config):
    given = {"max_model_len": 100, "max_num_seqs": 64, "max_num_batched_tokens": 64}
    plan = fastgen.plan(config, dtype=torch.float32, memory_bytes=2_000_000, **given)
    cache = plan.kv_cache
    taken = plan.weights.total_bytes + plan.activation_bytes
    assert cache.pool_bytes == 2_000_000 - taken
    assert cache.tokens == (cache.num_blocks - 1) * 16
    assert cache.sequences == (cache.num_blocks - 1) // 7 > 1, "100 tokens are 7 blocks"
    assert cache.sequence_bytes == 7 * 16 * cache.bytes_per_token
    model = fastgen.optimize(tiny_model("llama"), kv_cache_memory_bytes=cache.pool_bytes, **given)
    assert fastgen.api.require(model).engine()._pool_size().num_blocks() == cache.num_blocks
    fastgen.restore(model)
    few = fastgen.plan(config, memory_bytes=2_000_000, **{**given, "max_num_seqs": 1})
    assert few.kv_cache.sequences == 1


def test_auto_packs_within_a_quarter_of_what_the_weights_leave(config):
    everything = fastgen.plan(config, dtype=torch.bfloat16)
    packed, weights = everything.weights.packed_bytes, everything.weights.parameter_bytes
    if not packed:
        pytest.skip("this processor packs nothing")
    memory = weights + everything.weights.buffer_bytes + 2 * packed
    part = fastgen.plan(config, dtype=torch.bfloat16, memory_bytes=memory, max_num_batched_tokens=8)
    assert 0 < part.weights.packed_bytes <= packed // 2
    off = fastgen.plan(config, dtype=torch.bfloat16, pack=False)
    assert off.weights.packed_bytes == 0
    gpu = fastgen.plan(config, dtype=torch.bfloat16, device=DEVICES["h100"])
    assert gpu.weights.packed_bytes == 0


def test_windows_bound_what_is_seen_of_a_sequence():
    config = tiny_model("gemma2").config  # one layer with a window of 12, one without
    cache = fastgen.plan(config, dtype=torch.float32, max_model_len=300).kv_cache
    layer = cache.bytes_per_token // 2
    assert cache.sequence_bytes == 2 * layer * 304
    assert WINDOW <= 16
    assert cache.windowed_sequence_bytes == layer * (304 + 16)


def test_floors_are_flops_or_bytes(config):
    floors = fastgen.plan(
        config, dtype=torch.float32, device=DEVICE, prompt_tokens=50, batch=3, context_tokens=20
    ).floors
    pairs = 50 * 51 // 2
    assert floors.prefill_flops == 2 * (50 * BODY + HEAD) + 2 * 2 * pairs * 4 * 32
    assert floors.ttft_ms == pytest.approx(floors.prefill_flops / 1e9 * 1e3)
    assert floors.ttft_bound_by == "compute"
    assert floors.decode_flops == 2 * 3 * (BODY + HEAD) + 2 * 2 * 3 * 20 * 4 * 32
    assert floors.decode_bytes == 4 * (BODY + HEAD) + 2 * 3 * 20 * 2 * 32 * 4
    slow = Device("slow memory", 1e-3, 1.0)
    bound = fastgen.plan(config, dtype=torch.float32, device=slow, batch=3, context_tokens=20)
    assert bound.floors.tpot_bound_by == "bandwidth"
    assert bound.floors.tpot_ms == pytest.approx(floors.decode_bytes / 1e6 * 1e3)
    assert bound.floors.tokens_per_s == pytest.approx(3 / bound.floors.tpot_ms * 1e3)


def test_a_chunked_prompt_reads_the_weights_once_per_chunk(config):
    slow = Device("slow memory", 1e-3, 1.0)
    given = {"dtype": torch.float32, "device": slow, "prompt_tokens": 50}
    whole = fastgen.plan(config, **given).floors
    chunked = fastgen.plan(config, max_num_batched_tokens=20, **given).floors
    assert chunked.prefill_flops == whole.prefill_flops
    more = 4 * 2 * BODY + 4 * 2 * (20 + 40) * 64
    assert chunked.ttft_ms - whole.ttft_ms == pytest.approx(more / 1e6 * 1e3)


def test_of_experts_a_token_meets_a_few():
    model = tiny_model("mixtral")
    plan = fastgen.plan(model.config, dtype=torch.float32, device=DEVICE)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    weights = plan.weights
    assert weights.matmul_parameters - weights.active_parameters == experts // 2
    everything = fastgen.plan(model.config, dtype=torch.float32, device=DEVICE, batch=2).floors
    keys = 2 * 512 * 2 * 32 * 4  # of one more sequence of 512 tokens
    assert everything.decode_bytes - plan.floors.decode_bytes == 4 * experts // 2 + keys


def test_a_config_larger_than_memory_is_planned():
    config = transformers.LlamaConfig(
        vocab_size=500_000, hidden_size=1 << 17, num_hidden_layers=2, num_attention_heads=1024,
        num_key_value_heads=8, intermediate_size=1 << 19, max_position_embeddings=4096,
    )  # fmt: skip
    plan = fastgen.plan(config, dtype=torch.bfloat16, pack=False)
    assert plan.weights.parameter_bytes > 1 << 39
    assert plan.weights.active_parameters == plan.weights.matmul_parameters
    assert plan.kv_cache.bytes_per_token == 2 * 2 * 8 * 128 * 2


@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_folder_and_its_config_are_taken(where):
    folder = demo_model_dir()
    plan = fastgen.plan(folder if where == "folder" else folder / "config.json", device=DEVICE)
    data = json.loads(plan.to_json())
    assert data["model"] == "LlamaForCausalLM"
    assert data["dtype"] == "bfloat16"
    assert data["kv_cache"]["bytes_per_token"] == 1536
    assert data["weights"]["total_bytes"] == plan.weights.total_bytes
    assert "1536 bytes per token" in str(plan)
    assert "TPOT          at least" in str(plan)


def quantized() -> transformers.PretrainedConfig:
    config = transformers.LlamaConfig()
    config.quantization_config = {"quant_method": "mxfp4"}
    return config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transformers.MambaConfig(num_hidden_layers=2), "Mamba"),
        (lambda: transformers.T5Config(num_layers=1), "no causal LM"),
        (quantized, "quantised"),
    ],
    ids=["recurrent", "encoder-decoder", "quantised"],
)
def test_what_cannot_be_planned_is_refused_by_name(make, message):
    with pytest.raises(fastgen.UnsupportedModelError, match=message):
        fastgen.plan(make())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"memory_bytes": 1000}, ValueError, "memory_bytes must be >"),
        ({"memory_bytes": 0}, ValueError, "memory_bytes"),
        ({"max_model_len": 4096}, ValueError, "the model's limit"),
        ({"batch": 0}, ValueError, "batch"),
        ({"prompt_tokens": 513}, ValueError, "prompt_tokens"),
        ({"block_size": 17}, ValueError, "block_size"),
        ({"memory_bytes": 1_500_000, "batch": 99, "max_num_batched_tokens": 99}, ValueError, "fit"),
        ({"device": DEVICES["h100"]}, ValueError, "2 bytes"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_fields_are_told(config, fields, error, message):
    with pytest.raises(error, match=message):
        fastgen.plan(config, dtype=torch.float32, **fields)


def test_an_unknown_product_is_refused(config, monkeypatch):
    monkeypatch.delitem(costs._PRODUCTS, "aten::linear")
    with pytest.raises(fastgen.UnsupportedModelError, match=r"linear reads .*, and what that"):
        fastgen.plan(config)


def test_a_folder_without_a_config_is_told(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        fastgen.plan(tmp_path)
