"""What generate() can be asked for, and which of it is left to transformers' own loop."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .prepared import TransformersLoop

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
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "guidance_scale": (None, 1.0),
    "cache_implementation": (None, "dynamic"),
    "use_cache": (None, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "stop_strings": (None,),
    "token_healing": (None, False),
    "is_assistant": (None, False),
    "low_memory": (None, False),
}
# Inputs of the model itself that the engine takes over.
_MODEL_INPUTS = {"input_ids", "attention_mask"}


def check_call(model: Any, arguments: dict[str, Any]) -> None:
    """Raise TransformersLoop if something that was asked for is not the engine's to do."""
    from transformers import GenerationConfig

    for name, off in _LOOP_ARGUMENTS.items():
        if (value := arguments.get(name)) is not None and value not in off:
            raise TransformersLoop(f"{name} is set")
    given = arguments.get("generation_config")

    def chosen(name: str) -> Any:
        """A field's value: the first that is set wins, as transformers merges them."""
        configs = (given, model.generation_config)
        values = (arguments.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    for name, off in _LOOP_FIELDS.items():
        if (value := chosen(name)) is not None and value not in off:
            raise TransformersLoop(f"{name}={value!r}")
    _check_beams(model, chosen("num_beams"), arguments)
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


def _check_beams(model: Any, num_beams: Any, arguments: dict[str, Any]) -> None:
    from transformers import GenerationMixin

    if num_beams in (None, 1):
        return
    if type(num_beams) is not int or num_beams < 1:
        raise TransformersLoop(f"num_beams={num_beams!r}")
    if "streamer" in arguments:
        raise TransformersLoop("a streamer with beams")
    own = type(model)._beam_search is not GenerationMixin._beam_search  # pyright: ignore
    if own or hasattr(model, "_reorder_cache"):
        raise TransformersLoop(f"{type(model).__name__} has a beam search of its own")


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
