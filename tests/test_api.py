"""optimize, restore, explain, release_cache: what a user holds, and what is refused by name."""

import copy
import gc
import json
import logging
import os
import signal
import sys
import threading
import weakref

import pytest
import torch
from tiny_models import NativeTokens, prompts, tiny_model

import fastgen

IDS = torch.tensor(prompts(9))
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(before, after):
    assert list(before) == list(after)
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_optimize_returns_the_same_model_and_keeps_its_function(model):
    before, outputs = state(model), logits(model)
    parameters = dict(model.named_parameters())
    assert fastgen.optimize(model) is model
    assert_same_state(before, model.state_dict())
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert torch.equal(logits(model), outputs)


def test_restore_is_bit_equal(model):
    gc.collect()  # other models of the class, of tests that ended
    before, outputs = state(model), logits(model)
    fastgen.optimize(model)
    model.generate(IDS, **GREEDY)
    assert fastgen.restore(model) is model
    assert_same_state(before, model.state_dict())
    assert torch.equal(logits(model), outputs)
    assert "generate" not in vars(type(model)), "the class is still patched"


def test_backward_works_while_optimised(model):
    reference = copy.deepcopy(model)
    fastgen.optimize(model)
    model.generate(IDS, **GREEDY)
    for each in (reference, model):
        each(IDS, labels=IDS).loss.backward()
    for (name, a), (_, b) in zip(
        reference.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(a.grad, b.grad), name


def test_training_step_changes_the_next_tokens(model):
    reference = copy.deepcopy(model)
    fastgen.optimize(model)
    model.generate(IDS, **GREEDY)
    for each in (reference, model):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.05)
        each(IDS, labels=IDS).loss.backward()
        optimizer.step()
    expected = reference.generate(IDS, **GREEDY)
    with NativeTokens(model):
        assert torch.equal(model.generate(IDS, **GREEDY), expected)


def test_optimize_twice_is_a_no_op(optimized):
    one = fastgen.api.lookup(optimized)
    assert fastgen.optimize(optimized) is optimized
    assert fastgen.api.lookup(optimized) is one


def test_optimize_twice_with_other_settings_is_refused(optimized):
    with pytest.raises(ValueError, match="other settings"):
        fastgen.optimize(optimized, block_size=32)


@pytest.mark.parametrize(
    "call", [fastgen.restore, fastgen.explain, fastgen.release_cache], ids=lambda f: f.__name__
)
def test_not_optimised_is_named(model, call):
    with pytest.raises(fastgen.NotOptimizedError, match=r"fastgen\.optimize"):
        call(model)


def test_unknown_field_and_bad_values(model):
    with pytest.raises(TypeError, match="no field 'blok_size'"):
        fastgen.optimize(model, blok_size=16)
    with pytest.raises(ValueError, match="max_model_len must be <= 512"):
        fastgen.optimize(model, max_model_len=513)
    with pytest.raises(ValueError, match="passes_off may name merge_linears"):
        fastgen.optimize(model, passes_off=["canonicalize"])
    assert fastgen.api.lookup(model) is None


def test_a_pass_is_switched_off_by_name(model):
    expected = model.generate(IDS, **GREEDY)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    fastgen.optimize(model, passes_off=["merge_linears"])
    assert torch.equal(model.generate(IDS, **GREEDY), expected)
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == storages
    assert "merge_linears: 0 (off)" in str(fastgen.explain(model))


def test_failed_optimize_leaves_the_model_untouched(model, monkeypatch):
    gc.collect()  # other models of the class, of tests that ended
    before, outputs = state(model), logits(model)
    pointers = [p.data_ptr() for p in model.parameters()]

    def fail(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(fastgen.optimized, "fingerprint", fail)
    with pytest.raises(RuntimeError, match="planted"):
        fastgen.optimize(model)
    monkeypatch.undo()
    assert fastgen.api.lookup(model) is None
    assert_same_state(before, model.state_dict())
    assert torch.equal(logits(model), outputs)
    storages = [p.untyped_storage().nbytes() for p in model.parameters()]
    assert storages == [p.nbytes for p in model.parameters()]
    assert len(set(pointers)) == len({p.data_ptr() for p in model.parameters()})
    assert "generate" not in vars(type(model))


def test_explain_says_what_was_done(optimized):
    optimized.generate(IDS, **GREEDY)
    optimized.generate(IDS, use_cache=False, max_new_tokens=3)
    explanation = fastgen.explain(optimized)
    text, data = str(explanation), json.loads(explanation.to_json())
    # Which implementation, the machine decides: C++ needs a compiler.
    (chosen,) = data["kernels"]["fastgen::paged_attention"]
    for needed in (
        "merge_linears: 4",
        f"fastgen::paged_attention x 2: {chosen}",
        "use_cache=False",
    ):
        assert needed in text
    assert data["passes"][1] == {
        "name": "merge_linears",
        "matches": 4,
        "refused": [],
        "seconds": data["passes"][1]["seconds"],
        "status": "applied",
    }
    assert data["metrics"]["output_tokens"] == 12
    assert data["fallbacks"] == {"use_cache=False": 1}


def test_explain_names_a_refused_merge(family):
    model = tiny_model(family)
    layer = model.model.layers[0].self_attn
    layer.k_proj.weight = layer.v_proj.weight  # tied: must stay where it is
    expected = model.generate(IDS, **GREEDY)
    fastgen.optimize(model)
    assert "layers.0.self_attn" in str(fastgen.explain(model))
    assert "shares its memory" in str(fastgen.explain(model))
    with NativeTokens(model):
        assert torch.equal(model.generate(IDS, **GREEDY), expected)


def test_release_cache_gives_the_pool_back(optimized):
    expected = optimized.generate(IDS, **GREEDY)
    core = fastgen.api.require(optimized).engine()
    tensors = [weakref.ref(tensor) for tensor in core._runner.kv_cache.tensors.values()]
    fastgen.release_cache(optimized)
    gc.collect()
    assert all(reference() is None for reference in tensors)
    assert torch.equal(optimized.generate(IDS, **GREEDY), expected)


def test_release_cache_while_running_is_refused(optimized):
    engine = fastgen.Engine(optimized)
    request = engine.submit([1, 2, 3], fastgen.SamplingParams(max_tokens=400, temperature=0.0))
    with pytest.raises(fastgen.FastgenError, match="requests are running"):
        fastgen.release_cache(optimized)
    engine.cancel(request)
    fastgen.release_cache(optimized)


# Copies and lifetimes.


def test_a_deep_copy_is_not_optimised_and_right(optimized):
    expected = optimized.generate(IDS, **GREEDY)
    twin = copy.deepcopy(optimized)
    with torch.no_grad():
        twin.lm_head.weight.mul_(-1)
    assert fastgen.api.lookup(twin) is None
    reference = copy.deepcopy(twin)
    assert torch.equal(twin.generate(IDS, **GREEDY), reference.generate(IDS, **GREEDY))
    assert torch.equal(optimized.generate(IDS, **GREEDY), expected)


def test_a_forgotten_model_goes_away_with_its_engine(family):
    model = fastgen.optimize(tiny_model(family))
    model.generate(IDS, **GREEDY)
    cls, reference = type(model), weakref.ref(model)
    core = weakref.ref(fastgen.api.require(model).engine())
    thread = core()._mailbox.thread
    del model
    gc.collect()
    assert reference() is None
    assert core() is None
    thread.join(timeout=10)
    assert not thread.is_alive()
    gc.collect()
    assert not any(type(m) is cls for m in list(fastgen.registry._optimized))
    assert "generate" not in vars(cls)


# The model changes under the optimisation.


def test_cast_after_optimize_is_captured_again(optimized):
    optimized.generate(IDS, **GREEDY)
    optimized.to(torch.bfloat16)
    reference = copy.deepcopy(optimized)
    expected = reference.generate(IDS, max_new_tokens=4, do_sample=False)
    with NativeTokens(optimized):
        got = optimized.generate(IDS, max_new_tokens=4, do_sample=False)
    assert got.shape == expected.shape
    assert fastgen.explain(optimized).spec.layers[0].dtype is torch.bfloat16
    merged = fastgen.api.require(optimized).weights._merged
    assert {item.tensor.dtype for item in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize("how", ["data", "assign", "module", "config", "in place"])
def test_a_changed_model_changes_the_tokens(optimized, how):
    before = optimized.generate(IDS, **GREEDY)
    torch.manual_seed(5)
    layer = optimized.model.layers[0]
    match how:
        case "data":
            layer.self_attn.q_proj.weight.data = torch.randn_like(layer.self_attn.q_proj.weight)
        case "assign":
            other = {name: torch.randn_like(t) for name, t in optimized.state_dict().items()}
            optimized.load_state_dict(other, assign=True)
        case "module":
            layer.mlp.act_fn = torch.nn.ReLU()
        case "config":
            layer.self_attn.scaling *= 3
        case "in place":
            with torch.no_grad():
                layer.mlp.up_proj.weight.normal_()
    expected = copy.deepcopy(optimized).generate(IDS, **GREEDY)
    assert not torch.equal(expected, before), "the change shows nothing"
    with NativeTokens(optimized):
        assert torch.equal(optimized.generate(IDS, **GREEDY), expected)


def test_a_hook_sends_generate_to_transformers_until_it_is_removed(optimized):
    calls = []
    hook = optimized.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    expected = copy.deepcopy(optimized).generate(IDS, **GREEDY)
    calls.clear()
    assert torch.equal(optimized.generate(IDS, **GREEDY), expected)
    assert calls, "the hook did not run"
    (reason,) = fastgen.api.require(optimized).fallbacks
    assert "hook" in reason
    with pytest.raises(fastgen.FastgenError, match="hook"):
        fastgen.Engine(optimized).submit([1, 2])
    hook.remove()
    with NativeTokens(optimized):
        assert torch.equal(optimized.generate(IDS, **GREEDY), expected)


def test_a_model_moved_to_meta_is_named(optimized):
    optimized.to("meta")
    with pytest.raises(fastgen.FastgenError, match="meta"):
        fastgen.Engine(optimized).submit([1, 2])


# The engine's front.


def test_engine_optimises_if_needed_and_shares_with_generate(model):
    engine = fastgen.Engine(model)
    expected = model.generate(IDS, **GREEDY)[0, 9:].tolist()
    (output,) = engine.generate(
        IDS.tolist(), fastgen.SamplingParams(max_tokens=12, temperature=0.0)
    )
    assert output.token_ids == expected
    assert output.finish_reason == "length"
    assert engine.metrics().output_tokens == 24


def test_default_params_are_the_generation_configs(model):
    model.generation_config.max_new_tokens = 5
    with fastgen.Engine(model) as engine:
        assert engine.default_params() == fastgen.SamplingParams(max_tokens=5, temperature=0.0)
        model.generation_config.do_sample = True
        model.generation_config.temperature = 0.5
        assert engine.default_params().temperature == 0.5
        assert engine.default_params().top_k == 50
        assert len(engine.generate(IDS.tolist())[0].token_ids) == 5


def test_closed_engine(model):
    engine = fastgen.Engine(model)
    engine.close()
    engine.close()
    with pytest.raises(fastgen.EngineClosedError, match="make a new one"):
        engine.submit([1, 2, 3])
    assert model.generate(IDS, **GREEDY).shape == (1, 21)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], fastgen.InvalidRequestError, "at least one token"),
        ([-1], fastgen.InvalidRequestError, "between 0 and 127"),
        ([128], fastgen.InvalidRequestError, "between 0 and 127"),
        ([True], fastgen.InvalidRequestError, "must be an int"),
        ([1.5], fastgen.InvalidRequestError, "must be an int"),
        ([2**63], fastgen.InvalidRequestError, "between 0 and 127"),
        ("text", fastgen.InvalidRequestError, "needs a tokenizer"),
        (None, fastgen.InvalidRequestError, "must be a str"),
        ([1] * 512, fastgen.CapacityError, "max_model_len"),
        ([1] * 497, fastgen.CapacityError, "max_model_len"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_bad_prompts_are_named_and_the_engine_goes_on(pair, prompt, error, message):
    engine = fastgen.Engine(pair[1])
    with pytest.raises(error, match=message):
        engine.submit(prompt, fastgen.SamplingParams(max_tokens=16))
    with pytest.raises(error, match=message):
        engine.generate([[1, 2], prompt], fastgen.SamplingParams(max_tokens=16))
    assert engine.metrics().num_running == 0
    assert len(engine.generate([[1, 2]], fastgen.SamplingParams(max_tokens=3))[0].token_ids) == 3


def test_request_beyond_the_pool_is_named(model):
    per_block = 16 * 2 * 2 * 2 * 16 * 4  # slots x layers x (k, v) x heads x head_dim x fp32
    engine = fastgen.Engine(model, kv_cache_memory_bytes=5 * per_block)
    with pytest.raises(fastgen.CapacityError, match="kv_cache_memory_bytes"):
        engine.submit([1] * 60, fastgen.SamplingParams(max_tokens=16))
    assert engine.generate([[1] * 60], fastgen.SamplingParams(max_tokens=5))[0].token_ids


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_ctrl_c_returns_the_blocks(optimized, sampled):
    expected = optimized.generate(IDS, **GREEDY)
    core = fastgen.api.require(optimized).engine()
    timer = threading.Timer(0.1, os.kill, args=(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        optimized.generate(IDS, do_sample=sampled, max_new_tokens=500)
    timer.join()
    metrics = core.metrics()
    assert metrics.num_free_blocks == metrics.num_blocks
    assert metrics.num_running == metrics.num_waiting == 0
    assert torch.equal(optimized.generate(IDS, **GREEDY), expected)


def test_one_info_line_and_no_prints(family, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="fastgen"):
        fastgen.optimize(tiny_model(family))
    assert [r.levelname for r in caplog.records if r.name == "fastgen"] == ["INFO"]
    assert capsys.readouterr().out == ""


def test_optimize_from_two_threads(family):
    model = tiny_model(family)
    threads = [threading.Thread(target=fastgen.optimize, args=(model,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert model.generate(IDS, **GREEDY).shape == (1, 21)
