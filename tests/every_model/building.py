"""A tiny random fp32 model of any type."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .sizes import SIZES, SPECIAL

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_MOST_PARAMETERS = 50_000_000

# Fields that name the kind of each layer; a tiny model has each kind once.
_KINDS = ("layer_types", "mlp_layer_types")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How weights are drawn: deviation of the matrices, and of the embeddings."""

    matrices: float = 0.3
    embeddings: float = 0.3
    seed: int = 0


# In the order in which they are tried: embeddings that outweigh the layers repeat one token.
RECIPES = (
    Recipe(),
    Recipe(embeddings=0.03),
    Recipe(matrices=0.15),
    Recipe(matrices=0.6, embeddings=0.1),
    Recipe(matrices=1.0),
    Recipe(matrices=0.08, embeddings=1.0),
    Recipe(matrices=0.15, embeddings=2.0, seed=3),
)


def model_class(model_type: str) -> Any:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def tiny_config(model_type: str) -> Any:
    """What AutoModelForCausalLM would give to the model: of a composite, perhaps its text part."""
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**_fields(config_class, SPECIAL.get(model_type, {})))
    if isinstance(config, model_class(model_type).config_class):
        return config
    return config.get_text_config(decoder=True)


def _fields(config_class: Any, special: dict) -> dict[str, Any]:
    """The sizes this class of configurations has, and the same for configurations inside it."""
    default = _default(config_class)
    known = _names(config_class)
    fields = {name: size for name, size in SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:  # latent attention: every head has keys, of its own size
        fields.pop("head_dim", None)
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for name, inner in (getattr(config_class, "sub_configs", None) or {}).items():
        own = special.get(name, {})
        if not hasattr(inner, "model_type"):  # any: the kind that the default has
            inner = type(getattr(default, name, None))
        if inner is not type(None):
            fields[name] = _fields(inner, own)
            fields[name]["model_type"] = inner.model_type
    fields |= _kinds_of_layers(config_class, default)
    return fields | {
        name: value
        for name, value in special.items()
        if not (name in fields and isinstance(fields[name], dict) and isinstance(value, dict))
    }


def _names(config_class: Any) -> set[str]:
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)


def _default(config_class: Any) -> Any:
    try:
        return config_class()
    except Exception:  # a configuration that must be told something
        return None


def _kinds_of_layers(config_class: Any, default: Any) -> dict[str, Any]:
    """One layer of each kind that the default configuration has, two at least."""
    found, names = {}, _names(config_class)
    for name in names.intersection(_KINDS):
        kinds = list(dict.fromkeys(getattr(default, name, None) or ()))
        if kinds:
            found[name] = kinds
    if not found:
        return {}
    depth = max(2, *map(len, found.values()))
    layers = {name: (kinds * depth)[:depth] for name, kinds in found.items()}
    return layers | {name: depth for name in ("num_hidden_layers",) if name in names}


def tiny_model(model_type: str, recipe: Recipe = RECIPES[0]) -> Any:
    """In evaluation mode, on the CPU, with nothing left at zero or one.

    Raises: whatever transformers raises if it cannot be built; ValueError if it is not tiny.
    """
    cls, config = model_class(model_type), tiny_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"the tiny model has {size} parameters; give sizes for it")
    torch.manual_seed(recipe.seed)
    model = cls(config).to(torch.float32).eval()
    _draw(model, recipe)
    # What a type's own configuration asks of generate() is not in question here.
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


@torch.no_grad()
def _draw(model: Any, recipe: Recipe) -> None:
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        elif id(parameter) in embeddings:
            parameter.normal_(0, recipe.embeddings)
        else:
            parameter.normal_(0, recipe.matrices)
    for buffer in model.buffers():
        is_trivial = buffer.is_floating_point() and bool(((buffer == 0) | (buffer == 1)).all())
        if is_trivial and buffer.ndim < 2:
            buffer.add_(torch.randn_like(buffer), alpha=0.3)
