"""What models do each in their way: number tokens, choose rows, drop what attention is told."""

from __future__ import annotations

import pytest
import torch
from every_model.building import tiny_model
from tiny_models import NativeTokens, left_padded, prompts
from tiny_models import tiny_model as family_model
from transformers import AttentionInterface

import fastgen
from fastgen.capture import attention, capture, capturing
from fastgen.capture.places import _COUNTING
from fastgen.errors import UnsupportedModelError
from fastgen.generate.rows import columns

aten = torch.ops.aten


def nodes(captured, *targets) -> list:
    return [node for node in captured.graph.nodes if node.target in targets]


@pytest.fixture(scope="module")
def bart():
    return tiny_model("bart")


def test_positions_take_the_place_of_counting(bart):
    """Also a mask that nothing reads, that of an encoder which is not there, is no obstacle."""
    captured = capture(bart)
    assert not nodes(captured, *_COUNTING)
    (positions,) = [
        node for node in captured.placeholders() if captured.inputs[node.name].target == "positions"
    ]
    assert positions.users


def test_counting_that_stays_is_refused(bart, monkeypatch):
    monkeypatch.setattr(capturing, "number_by_position", lambda captured, every_count: None)
    with pytest.raises(UnsupportedModelError, match="does not keep sequences apart"):
        capture(bart)


def test_the_mask_of_an_encoder_is_refused_where_it_is_read(bart, monkeypatch):
    from transformers.models.bart import modeling_bart

    monkeypatch.setattr(
        modeling_bart, "create_causal_mask", modeling_bart.create_bidirectional_mask
    )
    with pytest.raises(UnsupportedModelError, match="layer 0: mask function bidirectional"):
        capture(bart)


def test_a_head_without_logits_to_keep_gets_the_rows_alone():
    captured = capture(tiny_model("whisper"))
    (indices,) = [
        node
        for node in captured.placeholders()
        if captured.inputs[node.name].target == "logits_indices"
    ]
    head = nodes(captured, aten.linear.default)[-1]
    assert str(head.meta["val"].shape[1]) == str(indices.meta["val"].shape[0])


def test_flags_of_eager_attention_are_not_read():
    """Its decoder is said not to be causal, and the mask that it reads is."""
    model = tiny_model("bigbird_pegasus")
    assert model.config._attn_implementation == "eager"
    flags = {getattr(module, "is_causal", None) for module in model.modules()}
    assert False in flags
    captured = capture(model)
    assert len(nodes(captured, torch.ops.fastgen.attention.default)) == captured.num_layers
    assert {getattr(module, "is_causal", None) for module in model.modules()} == flags


# generate().


def test_columns_begin_with_the_first_visible_token():
    ids = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert columns(ids, mask).tolist() == [[-2, -1, 0, 1], [0, 1, 2, 3]]
    assert columns(ids, None).tolist() == [[0, 1, 2, 3]] * 2


def test_rows_of_a_padded_batch_are_as_if_alone(bart):
    rows = prompts(5, 16, 9)
    alone = [
        bart.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False)[0, len(row) :]
        for row in rows
    ]
    fast = fastgen.optimize(tiny_model("bart"))
    ids, mask = left_padded(rows)
    with NativeTokens(fast, 24):
        out = fast.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert out[:, ids.shape[1] :].tolist() == [tokens.tolist() for tokens in alone]


def test_a_hole_in_a_row_is_transformers(bart):
    """Its model counts the hole, and the engine would not."""
    fast = fastgen.optimize(tiny_model("bart"))
    (row,) = prompts(8)
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[0, 3] = 0
    given = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    out = fast.generate(torch.tensor([row]), **given)
    assert dict(fastgen.api.require(fast).fallbacks) == {"positions do not count a row's tokens": 1}
    assert out.tolist() == bart.generate(torch.tensor([row]), **given).tolist()


# What transformers' own attention does not look at.


def sdpa_that_drops(module, query, key, value, attention_mask, **kwargs):
    return query, None


def sdpa_that_objects(module, query, key, value, attention_mask, **kwargs):
    raise ValueError("sdpa cannot do that")


def sdpa_that_knows(module, query, key, value, attention_mask, softcap=None, s_aux=None):
    return query, None


@pytest.mark.parametrize(
    ("sdpa", "own", "lost"),
    [
        (sdpa_that_drops, "sdpa", {"softcap", "s_aux"}),
        (sdpa_that_objects, "sdpa", set()),
        (sdpa_that_knows, "sdpa", set()),
        (sdpa_that_drops, "eager", set()),
    ],
    ids=["drops", "objects", "knows", "eager"],
)
def test_what_sdpa_drops_is_found_by_trying(monkeypatch, sdpa, own, lost):
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa)
    assert attention._lost_arguments(own) == lost


def test_soft_capping_that_is_looked_at_stays():
    captured = capture(family_model("gemma2"))
    attentions = nodes(captured, torch.ops.fastgen.attention.default)
    assert [node.args[6] for node in attentions] == [1.5] * 2


def test_dropping_what_the_model_looks_at_would_be_seen(monkeypatch):
    monkeypatch.setattr(attention, "_lost_arguments", lambda own: frozenset({"softcap"}))
    with pytest.raises(UnsupportedModelError, match="computes other logits"):
        capture(family_model("gemma2"))
