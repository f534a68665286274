"""Tiny models of many families, captured once per run, and what tests ask of a rewritten graph."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
import torch
from fastgen.passes import CapturedGraph, PassReport
from fastgen.passes.canonicalize import canonicalize
from fastgen.passes.merge_linears import merge_linears
from fastgen.passes.pipeline import check_form, check_values
from test_graph import evaluate
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastgen.capture import capture

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
_MORE = {
    "axk1": _LATENT,
    "deepseek_v2": {**_LATENT, "q_lora_rank": None, "head_dim": 8},
    "deepseek_v3": _LATENT,
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "glm": {"head_dim": 16},
    "glm4_moe_lite": _LATENT,
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "minicpm3": _LATENT,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"partial_rotary_factor": 0.5},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, **_EXPERTS},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"partial_rotary_factor": 0.5},
    "youtu": _LATENT,
}


def every_family(families: Iterable[str], quick_in_fp32: Iterable[str]):
    """Parametrize a test by family and dtype; fp32 is quick for one family of each spelling."""
    cases = [pytest.param(family, torch.bfloat16, id=f"{family}-bf16") for family in families]
    for family in families:
        marks = () if family in quick_in_fp32 else pytest.mark.slow
        cases.append(pytest.param(family, torch.float32, id=f"{family}-fp32", marks=marks))
    return pytest.mark.parametrize(("family", "dtype"), cases)


def make_model(family: str, dtype: torch.dtype = torch.float32):
    """A model whose norms' weights and biases are no ones and zeros, which hide mistakes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_SIZES, **_MORE.get(family, {})})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.5, 0.3)
            else:
                parameter.normal_(0, 0.2)
    return model


@functools.cache
def _captured_once(family: str, dtype: torch.dtype) -> tuple[nn.Module, CapturedGraph]:
    model = make_model(family, dtype)
    captured = capture(model)
    canonicalize(captured)
    merge_linears(captured)
    return model, captured


def captured_family(family: str, dtype: torch.dtype) -> tuple[nn.Module, CapturedGraph]:
    """A family's model and its graph as the fusing passes find it."""
    model, captured = _captured_once(family, dtype)
    return model, captured.copy()


def count(captured: CapturedGraph, target) -> int:
    return sum(node.target is target for node in captured.graph.nodes)


def reasons(report: PassReport) -> Counter[str]:
    return Counter(why for _, why in report.refused)


def logits(captured: CapturedGraph, model: nn.Module, num_tokens: int = 13) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, 128, (num_tokens,), generator=generator)
    positions = torch.arange(num_tokens) + 3
    return evaluate(captured, model, input_ids, positions, torch.arange(num_tokens))


def fuse_family(run: Callable[[CapturedGraph], PassReport], family: str, dtype: torch.dtype):
    """Run a fusing pass over a family's graph: bit-equal logits, and nothing left to match.

    Returns the graph before, the graph after and the report.
    """
    model, before = captured_family(family, dtype)
    after = before.copy()
    report = run(after)
    check_form(after)
    check_values(before, after)
    for num_tokens in (1, 13):
        expected = logits(before, model, num_tokens)
        assert expected.isfinite().all()
        assert torch.equal(logits(after, model, num_tokens), expected)
    assert run(after).matches == 0
    return before, after, report


def fuse_module(
    run: Callable[[CapturedGraph], PassReport],
    before: CapturedGraph,
    module: nn.Module,
    *batch: torch.Tensor,
):
    """Run a fusing pass over a little module's graph: bit-equal results for `batch`.

    Returns the graph after and the report.
    """
    canonicalize(before)
    after = before.copy()
    report = run(after)
    check_form(after)
    check_values(before, after)
    assert torch.equal(evaluate(after, module, *batch), evaluate(before, module, *batch))
    assert run(after).matches == 0
    return after, report
