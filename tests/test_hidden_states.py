"""output_hidden_states: what transformers returns, of every token and layer, made by the engine."""

import pytest
import torch
from conftest import poison
from tiny_models import NativeTokens, greedy_alone, left_padded, prompts, tiny_model
from variant_helpers import (
    EVERYTHING,
    HIDDEN,
    Beside,
    assert_equal,
    assert_hidden_states,
    blocks,
    both,
    weights_of,
)

import fastgen
from fastgen.engine import lockstep

pytestmark = pytest.mark.usefixtures("graphs_of_the_session")
GREEDY = {"do_sample": False, "max_new_tokens": 12}
IDS = torch.tensor(prompts(20, 20, 20))


@pytest.fixture(scope="module")
def pair():
    plain, fast = tiny_model("llama"), tiny_model("llama")
    fastgen.optimize(fast)
    poison(fast)
    return plain, fast


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_families(family):
    plain, fast = tiny_model(family), fastgen.optimize(tiny_model(family))
    expected, got = both((plain, fast), input_ids=IDS, **GREEDY, **EVERYTHING)
    assert_equal(expected, got)
    shapes = [[tuple(state.shape) for state in step] for step in got.hidden_states]
    assert shapes == [[(3, 20, 64)] * 3] + [[(3, 1, 64)] * 3] * 11


@pytest.mark.parametrize(
    "options",
    [{}, {"num_return_sequences": 2}, {"eos_token_id": 5, "pad_token_id": 0}, {"use_cache": True}],
    ids=str,
)
def test_sampling(pair, options):
    arguments = {"do_sample": True, "top_k": 30, "max_new_tokens": 9, **EVERYTHING, **options}
    assert_equal(*both(pair, input_ids=IDS, **arguments))


def test_they_are_the_callers_own(pair):
    """Nothing that runs later changes them, and changing them changes nothing."""
    expected, got = both(pair, input_ids=IDS, **GREEDY, **HIDDEN)
    copies = [[state.clone() for state in step] for step in got.hidden_states]
    both(pair, input_ids=IDS.flip(0), **GREEDY, **HIDDEN)
    for step, copied in zip(got.hidden_states, copies, strict=True):
        assert all(map(torch.equal, step, copied))
        for state in step:
            state.fill_(float("nan"))
    assert_equal(expected, both(pair, input_ids=IDS, **GREEDY, **HIDDEN)[1])


def test_under_inference_mode(pair):
    with torch.inference_mode():
        assert_equal(*both(pair, input_ids=IDS, **GREEDY, **HIDDEN))


def test_a_prompt_whose_prefix_is_cached_is_computed_whole(pair):
    _, fast = pair
    fast.generate(IDS, **GREEDY)
    before = fastgen.explain(fast).metrics.prefix_cache_hit_tokens
    fast.generate(IDS, **GREEDY)
    hits = fastgen.explain(fast).metrics.prefix_cache_hit_tokens
    assert hits > before, "nothing is found in the cache: the test shows nothing"
    assert_equal(*both(pair, input_ids=IDS, **GREEDY, **HIDDEN))
    assert fastgen.explain(fast).metrics.prefix_cache_hit_tokens == hits


def test_without_an_output_object_the_plain_graph_runs():
    model = fastgen.optimize(tiny_model("llama"))
    with NativeTokens(model):
        model.generate(IDS, output_hidden_states=True, **GREEDY)
    assert fastgen.explain(model).variants == {}


@pytest.mark.parametrize("budget", [7, 32])
def test_chunked_prompts(budget):
    plain, fast = tiny_model("llama"), tiny_model("llama")
    fastgen.optimize(fast, max_num_batched_tokens=budget)
    poison(fast)
    assert_equal(*both((plain, fast), input_ids=IDS, **GREEDY, **EVERYTHING))


def test_preempted_rows_are_not_collected_twice():
    """Two rows beside an older request that takes their blocks as it grows."""
    plain, fast = tiny_model("llama"), tiny_model("llama")
    rows, _ = greedy_alone(plain, 30, 30, num_tokens=60)
    fastgen.optimize(fast, max_num_batched_tokens=7, **blocks(fast, 28))
    poison(fast)
    fast.generate(IDS, do_sample=False, max_new_tokens=2, **HIDDEN)  # makes the graph
    arguments = {"input_ids": torch.tensor(rows), "max_new_tokens": 60, "do_sample": False}
    expected = plain.generate(**arguments, **HIDDEN)
    with Beside(fast, num_tokens=400, started=200) as beside, NativeTokens(fast):
        got = fast.generate(**arguments, **HIDDEN)
    assert fastgen.explain(fast).metrics.preemptions > 0, "nothing was preempted"
    assert_equal(expected, got)
    assert_beside(plain, beside)


def assert_beside(plain, beside):
    """The other request's tokens are those it has alone."""
    out = plain.generate(
        torch.tensor([beside.row]), do_sample=False, max_new_tokens=len(beside.token_ids)
    )
    assert beside.token_ids == out[0, len(beside.row) :].tolist()


def test_beside_a_request_that_wants_none(pair):
    plain, fast = pair
    fast.generate(IDS, **GREEDY, **HIDDEN)  # what is made once is made
    with Beside(fast, num_tokens=100) as beside:
        assert_equal(*both(pair, input_ids=IDS, **GREEDY, **HIDDEN))
    assert_beside(plain, beside)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attention_mask": left_padded(prompts(20, 9, 20))[1]}, "hidden states of masked slots"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size=8"),
        ({"num_beams": 2}, "beams with"),
        ({"output_attentions": True}, "output_attentions=True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_transformers_loop_by_name(pair, options, reason):
    plain, fast = pair
    expected = plain.generate(IDS, **GREEDY, **HIDDEN, **options)
    got = fast.generate(IDS, **GREEDY, **HIDDEN, **options)
    assert torch.equal(expected.sequences, got.sequences)
    assert any(reason in fallback for fallback in fastgen.explain(fast).fallbacks)


def test_what_cannot_be_captured_is_named_and_tried_once(monkeypatch):
    model = fastgen.optimize(tiny_model("llama"))
    tried = []

    def refuse(*_):
        tried.append(1)
        raise fastgen.UnsupportedModelError("planted")

    monkeypatch.setattr(fastgen.graphs, "capture", refuse)
    monkeypatch.setattr(fastgen.graphs.graph_cache, "load", lambda *_: None)
    for _ in range(2):
        out = model.generate(IDS, **GREEDY, **HIDDEN)
        assert len(out.hidden_states) == 12
    assert len(tried) == 1
    assert list(fastgen.explain(model).fallbacks) == ["hidden_states is not supported: planted"]


def test_explain_names_what_was_made(pair):
    _, fast = pair
    fast.generate(IDS, **GREEDY, **HIDDEN)
    explanation = fastgen.explain(fast)
    assert explanation.variants["hidden_states"] > 0
    assert "variant       with hidden_states, made in" in str(explanation)
    assert explanation.to_dict()["variants"] == explanation.variants


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_weight_exists_twice(dtype):
    model = tiny_model("llama", dtype=dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    fastgen.optimize(model)
    model.generate(IDS, **GREEDY, **HIDDEN)
    plain, variant = weights_of(model)
    assert variant
    for spec, weight in variant.items():
        assert weight is plain[spec]
    kinds = {spec.kind for spec in variant}
    assert "merged" in kinds or "packed" in kinds
    memory = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for weights in (plain, variant)
        for spec, tensor in weights.items()
        if spec.kind in ("parameter", "merged") and not tensor.is_mkldnn
    }
    assert sum(memory.values()) <= nbytes
    fastgen.restore(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_released_weights_cannot_be_captured_again():
    try:
        model = fastgen.optimize(tiny_model("llama", dtype=torch.bfloat16), release_weights=True)
    except fastgen.UnsupportedModelError as error:
        pytest.skip(str(error))
    with pytest.raises(fastgen.ReleasedWeightsError, match="hidden_states needs a second capture"):
        model.generate(IDS, **GREEDY, **HIDDEN)
    with NativeTokens(model):
        model.generate(IDS, **GREEDY)


def test_packed_weights_and_native_programs():
    """bf16: at most twice as far from fp32 as transformers' bf16, and a rounding of the largest."""
    bf16 = {"dtype": torch.bfloat16}
    plain, fast = tiny_model("llama", **bf16), fastgen.optimize(tiny_model("llama", **bf16))
    exact = tiny_model("llama", **bf16).float()
    arguments = {"input_ids": IDS, "max_new_tokens": 1, "do_sample": False, **HIDDEN}
    with NativeTokens(fast):
        states = [model.generate(**arguments).hidden_states[0] for model in (exact, plain, fast)]
    for true, theirs, ours in zip(*states, strict=True):
        assert ours.dtype == torch.bfloat16
        rounding = torch.finfo(torch.bfloat16).eps * true.abs().max()
        allowed = 2 * ((theirs - true).abs().max() + rounding)
        assert (ours - true).abs().max() <= allowed


def test_a_planted_mistake_is_seen(pair, monkeypatch):
    """The comparison of this file can fail: pieces that are off by one token of the step."""
    add = lockstep._HiddenStates.add
    monkeypatch.setattr(
        lockstep._HiddenStates,
        "add",
        lambda self, start, states, place, count: add(
            self, start, states, max(0, place - 1), count
        ),
    )
    expected, got = both(pair, input_ids=IDS, **GREEDY, **HIDDEN)
    assert torch.equal(expected.sequences, got.sequences)
    with pytest.raises(AssertionError):
        assert_hidden_states(expected.hidden_states, got.hidden_states)
