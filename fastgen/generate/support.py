"""What generate() can be asked for, and which of it is left to transformers' own loop."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .prepared import PreparedCall, TransformersLoop

# Arguments and generation-config fields that transformers' own loop is left to do, with the value
# that switches each off.
_LOOP_ARGUMENTS = {
    "custom_generate": (None,),
    "assistant_model": (None,),
    "negative_prompt_ids": (None,),
    "negative_prompt_attention_mask": (None,),
    "synced_gpus": (None, False),
}
_LOOP_FIELDS = {
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "guidance_scale": (None, 1.0),
    "cache_implementation": (None, "dynamic"),
    "use_cache": (None, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False, True),
    "stop_strings": (None,),
    "token_healing": (None, False),
    "is_assistant": (None, False),
    "low_memory": (None, False),
}
# Inputs of the model itself that the engine takes over.
_MODEL_INPUTS = {"input_ids", "attention_mask", "inputs_embeds"}


def check_call(model: Any, arguments: dict[str, Any]) -> None:
    """Raise TransformersLoop if something that was asked for is not the engine's to do."""
    from transformers import GenerationConfig

    for name, off in _LOOP_ARGUMENTS.items():
        if (value := arguments.get(name)) is not None and value not in off:
            raise TransformersLoop(f"{name} is set")
    given = arguments.get("generation_config")
    for name, off in _LOOP_FIELDS.items():
        for value in (
            arguments.get(name),
            getattr(given, name, None),
            getattr(model.generation_config, name, None),
        ):
            if value is not None:  # the first that is set wins, as transformers merges them
                if value not in off:
                    raise TransformersLoop(f"{name}={value!r}")
                break
    known = set(vars(GenerationConfig())) | set(inspect.signature(type(model).generate).parameters)
    for name in arguments:
        if name not in known and name not in _MODEL_INPUTS and name != "tokenizer":
            raise TransformersLoop(f"the model input {name}")
    if torch.is_autocast_enabled(model.device.type):
        raise TransformersLoop("autocast is on")
    if _get_current_dispatch_mode() is not None:
        raise TransformersLoop("a torch dispatch mode is active")
    if dropout := _active_dropout(model):
        raise TransformersLoop(f"the model is in training mode with dropout ({dropout})")


def check_variant(call: PreparedCall) -> None:
    """Raise TransformersLoop if embeddings or hidden states are asked for in an unknown way."""
    wanted = call.generation_config.output_hidden_states
    if wanted is not None and type(wanted) is not bool:
        raise TransformersLoop(f"output_hidden_states={wanted!r}")
    if (size := call.generation_config.prefill_chunk_size) is not None:
        raise TransformersLoop(f"prefill_chunk_size={size} with {call.variant}")


def _active_dropout(model: Any) -> str | None:
    if not model.training:
        return None
    for name, value in vars(model.config).items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value > 0:
            return f"config.{name}={value}"
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0 and module.training:
            return f"{name}.p={module.p}"
    return None
