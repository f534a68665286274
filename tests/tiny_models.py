"""Tiny random models whose greedy tokens are far from a tie, and counters that say who made them.

Weights are scaled so that tokens vary.
"""

from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import fastgen

VOCAB = 128
_SIZES = {
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

FAMILIES: dict[str, Callable] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32):
    torch.manual_seed(seed)
    model = FAMILIES[family]().to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)  # transformers makes them zero, which hides mistakes
    return model


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def greedy_alone(model, *lengths: int, num_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of these lengths and transformers' greedy continuation of each, alone.

    Prompts whose continuation comes near a tie are passed over: what two right engines answer to
    those depends on the order of their sums.
    """
    rows, expected = [], []
    for length in lengths:
        for seed in range(20):
            (row,) = prompts(length, seed=seed)
            out = model.generate(
                torch.tensor([row]),
                max_new_tokens=num_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            if has_clear_margin(out.logits):
                break
        else:
            raise AssertionError("every prompt comes near a tie")
        rows.append(row)
        expected.append(out.sequences[0, length:].tolist())
    return rows, expected


def has_clear_margin(logits: tuple[torch.Tensor, ...]) -> bool:
    """Whether the two best logits always differ by 20 times the fp32 noise.

    The noise is taken as 16 roundings of the largest logit; two paths through these models were
    seen to differ by up to 13.
    """
    stacked = torch.cat(logits)
    best = stacked.topk(2, dim=-1).values
    noise = 16 * torch.finfo(torch.float32).eps * stacked.abs().amax(dim=-1)
    return bool((best[:, 0] - best[:, 1] >= 20 * noise).all())


class NativeTokens:
    """Asserts that the engine, and not transformers' loop, made the tokens of a block."""

    def __init__(self, model, at_least: int = 1) -> None:
        self.optimized, self.at_least = fastgen.api.require(model), at_least

    def __enter__(self) -> "NativeTokens":
        self.tokens = self._tokens()
        self.fallbacks = sum(self.optimized.fallbacks.values())
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            assert sum(self.optimized.fallbacks.values()) == self.fallbacks, (
                "transformers' loop ran"
            )
            assert self._tokens() - self.tokens >= self.at_least, "the engine made no tokens"

    def _tokens(self) -> int:
        return self.optimized.engine().metrics().output_tokens
