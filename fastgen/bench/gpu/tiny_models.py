"""Tiny random models of five families, and greedy tokens of theirs that are far from a tie."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB = 128
WINDOW = 12
_NOISE = 64  # roundings of the largest logit
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# What is special of a family: windows, softcaps, sinks, scales that are not 1 / sqrt(head_dim).
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 2,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 5.0,
        "sliding_window": WINDOW,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": WINDOW,
    },
}


def tiny_model(family: str, device: str) -> Any:
    """An fp32 model in evaluation mode; also what is initialised to zero or one is random."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **_SIZES, **_OWN[family])
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(0, 0.3)
            elif tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
            if family == "gemma2" and ".post_" in name:
                tensor.add_(16)  # else the scaled embedding outweighs the layers: one token forever
    return model.to(device).eval()


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()


def greedy(model: Any, length: int, num_tokens: int) -> tuple[list[int], list[int]]:
    """A prompt and transformers' continuation of it, alone.

    Prompts whose continuation comes near a tie are passed over: what two right engines answer to
    those depends on the order of their sums.
    """
    for seed in range(20):
        row = prompt(length, seed)
        out = model.generate(
            torch.tensor([row], device=model.device),
            max_new_tokens=num_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.cat(out.logits).float()
        best = logits.topk(2, dim=-1).values
        noise = _NOISE * torch.finfo(torch.float32).eps * float(logits.abs().max())
        if bool((best[:, 0] - best[:, 1] >= 20 * noise).all()):
            return row, out.sequences[0, length:].tolist()
    raise AssertionError(f"every prompt of {length} tokens comes near a tie")
