"""Tiny random models under the names that transformers' tests ask the hub for.

Most tests that name a tiny model of the hub only compare calls of generate() with each other. Their
stand-ins have the same class, the tokenizer of the demo model, and lie in a folder that is laid out
like the hub's cache. What a test knows of the real model's text fails with it, in the baseline too.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo_model"
REVISION = "0" * 40

_SIZES = {
    "vocab_size": 3072,  # of the demo model's tokenizer
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": 3072, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_GPT2 |= {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
_BART = {
    "vocab_size": 3072,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 512,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {"vocab_size": 3072, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_T5 |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}

_STAND_INS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "hf-internal-testing/tiny-gpt2-with-chatml-template": ("GPT2LMHeadModel", _GPT2),
    "distilbert/distilgpt2": ("GPT2LMHeadModel", _GPT2),
    "openai-community/gpt2": ("GPT2LMHeadModel", _GPT2),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", _SIZES),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _SIZES),
    "hf-internal-testing/tiny-random-PhiForCausalLM": ("PhiForCausalLM", _SIZES),
    "hf-internal-testing/llama-tokenizer": ("LlamaForCausalLM", _SIZES),
    "double7/vicuna-68m": ("LlamaForCausalLM", _SIZES),
    "EleutherAI/pythia-160m-deduped": ("GPTNeoXForCausalLM", _SIZES),
    "Qwen/Qwen2-0.5B-Instruct": ("Qwen2ForCausalLM", _SIZES),
    "hf-internal-testing/tiny-random-bloom": ("BloomForCausalLM", _SIZES),
    "hf-internal-testing/tiny-random-bart": ("BartForConditionalGeneration", _BART),
    "sshleifer/bart-tiny-random": ("BartForConditionalGeneration", _BART),
    "hf-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
}


def write_stand_ins(hub: Path) -> None:
    """Fill a folder that HF_HUB_CACHE can name; what is there already stays."""
    for name, (class_name, fields) in _STAND_INS.items():
        repository = hub / f"models--{name.replace('/', '--')}"
        reference = repository / "refs" / "main"
        if reference.exists():
            continue
        folder = repository / "snapshots" / REVISION
        torch.manual_seed(0)
        model_class = getattr(transformers, class_name)
        model_class(model_class.config_class(**fields)).save_pretrained(folder)
        for file in (*DEMO_MODEL.glob("tokenizer*.json"), *DEMO_MODEL.glob("*.jinja")):
            shutil.copy2(file, folder)
        reference.parent.mkdir(parents=True)
        reference.write_text(REVISION)
