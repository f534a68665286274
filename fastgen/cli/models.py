"""The models that commands run: a folder, the demo model, or a known shape with random weights."""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path
from typing import Any

import torch

# Shapes of well-known models; the weights are random, so only speed and memory mean anything.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def demo_model_dir() -> Path:
    """The tiny trained model that comes with the package."""
    return Path(str(resources.files("fastgen.demo_model")))


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--model",
        metavar="DIR",
        type=Path,
        required=required,
        help="a model folder on disk, or 'demo' for the one that comes with fastgen",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: the model's own")
    parser.add_argument("--device", default="cpu", help="default: cpu")


def load_model(folder: Path, dtype: str | None, device: str) -> tuple[Any, Any]:
    """A model and its tokenizer (None if the folder has none), never from a network.

    Raises: OSError if the folder holds no model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if str(folder) == "demo":
        folder = demo_model_dir()
    if not (folder / "config.json").is_file():
        raise OSError(f"--model must be a folder with a config.json, got {folder}")
    torch_dtype = DTYPES[dtype] if dtype else "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch_dtype, local_files_only=True
    )
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval(), tokenizer if has_tokenizer else None


def random_model(shape: str, dtype: str, device: str, seed: int = 0, **fields: Any) -> Any:
    """A model of a known shape with seeded random weights, made where it will be.

    fields: Of the configuration, which are others. Raises: ValueError for an unknown shape.
    """
    from transformers import AutoModelForCausalLM

    config = shape_config(shape, **fields)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return model.to(device).eval()


def shape_config(shape: str, **fields: Any) -> Any:
    """The transformers config of a known shape, with some fields changed.

    Raises: ValueError for an unknown shape.
    """
    from transformers import AutoConfig

    if shape not in SHAPES:
        raise ValueError(f"--shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    known = {**SHAPES[shape], **fields}
    return AutoConfig.for_model(known.pop("model_type"), **known)
