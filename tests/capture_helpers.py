"""What the tests of capture share: graphs to look into, photographs of models."""

from __future__ import annotations

import torch
from tiny_models import tiny_model
from transformers.models.llama import modeling_llama


def windowed_qwen2(*layer_types: str, window: int = 8):
    return tiny_model(
        "qwen2", use_sliding_window=True, sliding_window=window, layer_types=list(layer_types)
    )


def attentions(captured) -> list:
    target = torch.ops.fastgen.attention.default
    return [node for node in captured.graph.nodes if node.target is target]


def pass_to_attention(patch, **kwargs):
    original = modeling_llama.LlamaAttention.forward

    def forward(self, *args, **given):
        return original(self, *args, **given, **kwargs)

    patch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    return tiny_model("llama")


def photograph(model) -> dict:
    """Everything of a model that a capture could touch."""
    tensors = model.state_dict(keep_vars=True)
    hooks = [(m._forward_hooks.copy(), m._forward_pre_hooks.copy()) for m in model.modules()]
    return {
        "config": repr(vars(model.config)),
        "config object": id(model.config),
        "attention": model.config._attn_implementation,
        "generation config": repr(model.generation_config) if model.can_generate() else None,
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "training": [module.training for module in model.modules()],
        "tensors": {name: (id(t), t.data_ptr(), t._version) for name, t in tensors.items()},
        "values": {
            name: t.detach().clone() for name, t in tensors.items() if t.device.type != "meta"
        },
        "hooks": hooks,
        "gradients": [p.requires_grad for p in model.parameters()],
    }


def assert_untouched(model, before):
    after = photograph(model)
    values, old = after.pop("values"), before.pop("values")
    assert after == before
    assert values.keys() == old.keys()
    assert all(torch.equal(values[name], old[name]) for name in values)
