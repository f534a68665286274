"""RoPE whose frequencies follow the longest sequence, on both sides of where they change."""

from __future__ import annotations

import pytest
from layer_models import MODELS, THRESHOLD, layer_model
from tiny_models import NativeTokens, left_padded, prompts

import fastgen
import fastgen.graphs
from fastgen import SamplingParams
from fastgen.errors import CapacityError, UnsupportedModelError
from fastgen.graph_key import graph_key

NAMES = [name for name in MODELS if name.endswith(("longrope", "dynamic"))]


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """A plain model and an equal one that is optimised."""
    plain, fast = layer_model(request.param), layer_model(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastgen.graphs, "graph_key", graph_key)
        fastgen.optimize(fast)
    yield plain, fast
    fastgen.restore(fast)


def continued(model, length: int, num_tokens: int, rows: int = 1) -> list[list[int]]:
    ids, mask = left_padded(prompts(*[length] * rows))
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=None, do_sample=False
    )
    return out.tolist()


def num_fallbacks(model) -> int:
    return sum(fastgen.explain(model).fallbacks.values())


def test_up_to_the_threshold_and_beyond(pair):
    """The engine makes the last token that short frequencies can make; one more is the loop's."""
    plain, fast = pair
    with NativeTokens(fast, 10):
        assert continued(fast, THRESHOLD - 10, 10) == continued(plain, THRESHOLD - 10, 10)
    before = num_fallbacks(fast)
    assert continued(fast, THRESHOLD - 10, 11) == continued(plain, THRESHOLD - 10, 11)
    assert num_fallbacks(fast) == before + 1
    reasons = [
        why for why in fastgen.explain(fast).fallbacks if f"max_model_len ({THRESHOLD})" in why
    ]
    assert reasons


def test_short_sequences_after_long_ones(pair):
    """The loop leaves the frequencies of a long sequence in the model; the graph reads others."""
    plain, fast = pair
    expected = continued(layer_model_like(plain), 20, 30)
    graph = fastgen.api.require(fast)._graph
    assert continued(fast, THRESHOLD + 5, 4) == continued(plain, THRESHOLD + 5, 4)
    with NativeTokens(fast, 30):
        assert continued(fast, 20, 30) == expected
    if "longrope" in fastgen.api.require(fast)._graph.why_not_longer:  # dynamic is captured again
        assert fastgen.api.require(fast)._graph is graph


def layer_model_like(model):
    """The same model with nothing left from an earlier call."""
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_a_model_that_was_used_before_it_is_optimised(pair):
    """It is captured with the frequencies of short sequences, whatever it ran last."""
    plain, _ = pair
    used = layer_model_like(plain)
    continued(used, THRESHOLD + 5, 4)
    expected = continued(layer_model_like(plain), 20, 30)
    fastgen.optimize(used)
    with NativeTokens(used, 30):
        assert continued(used, 20, 30) == expected


def test_a_longer_request_is_refused(pair):
    _, fast = pair
    engine = fastgen.Engine(fast)
    with pytest.raises(CapacityError, match=f"max_model_len \\({THRESHOLD}\\)"):
        engine.submit(prompts(THRESHOLD - 10)[0], SamplingParams(max_tokens=11))


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-longrope"])
def test_what_ends_a_sequence_is_explained(name):
    model = layer_model(name)
    with pytest.raises(ValueError, match="beyond it, RoPE of type 'longrope' takes other freq"):
        fastgen.optimize(model, max_model_len=THRESHOLD + 1)
    fastgen.optimize(model, graph_cache=False)
    explanation = fastgen.explain(model)
    assert explanation.max_model_len == THRESHOLD
    assert "not longer  beyond it, RoPE of type 'longrope' takes other freq" in str(explanation)


@pytest.mark.parametrize("name", NAMES)
def test_long_frequencies_would_show(name):
    """The tests above can fail: with other frequencies the tokens are others."""
    model = layer_model(name)
    expected = continued(model, 30, 40)
    for module in model.modules():
        for buffer_name, buffer in module.named_buffers(recurse=False):
            if buffer_name.endswith("inv_freq"):
                buffer.mul_(0.5)
    assert continued(model, 30, 40) != expected


def test_frequencies_that_are_not_kept_are_refused():
    model = layer_model("phi3-longrope")
    del model.model.rotary_emb.original_inv_freq
    with pytest.raises(UnsupportedModelError, match="does not keep those of short sequences"):
        fastgen.optimize(model)
