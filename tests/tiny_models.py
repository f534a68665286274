"""Tiny random models whose greedy tokens are far from a tie, and counters that say who made them.

Weights are scaled so that tokens vary, and what transformers initialises to zero or one (biases,
norms, sinks) is random: either would hide a mistake.
"""

import torch
import transformers

import fastgen

VOCAB = 128
WINDOW = 12
SIZES = {
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
_WINDOW_FIRST = ["sliding_attention", "full_attention"]
_WINDOW_LAST = ["full_attention", "sliding_attention"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Model class, and the fields in which its configuration differs from SIZES: two layers that show
# what is special of the family. A scale that is not 1 / sqrt(head_dim) shows whether it is used.
_FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": WINDOW}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 2,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 5.0,
            "sliding_window": WINDOW,
        },
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 2,
            "sliding_window": WINDOW,
            "layer_types": _WINDOW_FIRST,
        },
    ),
    "phi3": ("Phi3ForCausalLM", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "granite": (
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
        },
    ),
    "cohere2": (
        "Cohere2ForCausalLM",
        {"sliding_window": WINDOW, "layer_types": _WINDOW_FIRST, "logit_scale": 0.7},
    ),
    "stablelm": ("StableLmForCausalLM", {"use_qkv_bias": True, "qk_layernorm": True}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_EXPERTS, "head_dim": 16}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 32,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": _WINDOW_LAST,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 16,
                "truncate": False,
            },
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}),
    "starcoder2": ("Starcoder2ForCausalLM", {"sliding_window": WINDOW}),
}
FAMILIES = tuple(_FAMILIES)
QUICK_FAMILIES = ("llama", "gemma2", "gpt_oss")


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **fields):
    """A model of a family in evaluation mode; fields change its configuration."""
    class_name, own = _FAMILIES[family]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**{**SIZES, **own, **fields}))
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("bias"):
                tensor.normal_(0, 0.3)
            elif isinstance(tensor, torch.nn.Parameter) and tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
            if family.startswith("gemma") and ".post_" in name:
                tensor.add_(16)  # else the scaled embedding outweighs the layers: one token forever
    return model.to(dtype).eval()


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


def has_clear_margin(logits: tuple[torch.Tensor, ...], noise: float | None = None) -> bool:
    """Whether the two best logits always differ by 20 times the fp32 noise.

    Noise that was not measured is taken as 64 roundings of the largest logit.
    """
    stacked = torch.cat(logits)
    best = stacked.topk(2, dim=-1).values
    if noise is None:
        noise = 64 * torch.finfo(torch.float32).eps * float(stacked.abs().max())
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
