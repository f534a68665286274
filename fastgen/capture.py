"""A Hugging Face causal LM becomes one graph. The only file that knows Hugging Face's names.

The model is called once, under torch.export, with flat packed tokens and no cache. Attention is
found by registration, not by pattern: transformers hands every attention call to the function
registered as "fastgen", which emits one `fastgen::attention`. Masks are found the same way: the
registered mask function emits a marker that names the kind of mask, and the marker's way through
the graph says which layer has which.
"""

from __future__ import annotations

import copy
import inspect
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from .errors import UnsupportedModelError
from .fingerprint import hooked_modules, marks_gradients, places_inputs
from .packing_check import check_packing
from .passes import BATCH_INPUTS, CapturedGraph, InputSpec
from .places import number_by_position
from .shared_keys import share_keys
from .tracing import trace

ATTENTION_NAME = "fastgen"

# Passed through to attention by the models, and without effect on a forward without a cache:
# positions have been applied by RoPE, the rest says what to return.
_IGNORED_KWARGS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_router_logits",
}

# Kinds of layers, by the names that configurations give them, that attend to all earlier tokens, to
# a window of them or to those of one chunk, and keep nothing else. Which, the masks say.
_LAYER_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}

# torch.export keeps global state: one capture at a time in a process.
_capture_lock = threading.Lock()


@torch.library.custom_op("fastgen::mask_marker", mutates_args=())
def mask_marker(padding_mask: torch.Tensor, kind: str, size: int) -> torch.Tensor:
    """Stands for a mask in a captured graph; resolved before the graph can run.

    Args:
        padding_mask: [1, num_tokens] bool. kind: "causal", "sliding", "chunked", or the name of a
            mask function that is not understood. size: Keys in a window, or tokens in a chunk.
    Raises: RuntimeError if it is ever run.
    """
    raise RuntimeError("a mask marker was left in a graph that runs")


@mask_marker.register_fake
def _(padding_mask, kind, size):
    num_tokens = padding_mask.shape[1]
    return padding_mask.new_empty((1, 1, num_tokens, num_tokens))


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for attention while a graph is captured.

    query: [1, num_heads, num_tokens, head_dim]; returns [1, num_tokens, num_heads, v_head_dim].
    """
    where = f"attention of layer {getattr(module, 'layer_idx', '?')}"
    for name, given in kwargs.items():
        if given is not None and name not in _IGNORED_KWARGS:
            raise UnsupportedModelError(f"{where}: {name}={given!r} is not understood")
    if dropout:
        raise UnsupportedModelError(f"{where}: dropout={dropout} is active in evaluation mode")
    if is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise UnsupportedModelError(f"{where}: is_causal=False; only causal attention is supported")
    layer_idx = getattr(module, "layer_idx", None)
    if not isinstance(layer_idx, int):
        raise UnsupportedModelError(f"{where}: layer_idx={layer_idx!r}, an int is needed")
    if attention_mask is None:
        raise UnsupportedModelError(f"{where}: no mask was made, so that causality is not known")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = torch.ops.fastgen.attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        attention_mask,
        scale,
        sliding_window or 0,
        softcap or 0.0,
        s_aux,
        layer_idx,
    )
    return output.unsqueeze(0), None


def _mask_forward(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """What transformers calls to make a mask while a graph is captured.

    Some models make masks that no attention here reads (a decoder's for its encoder), so that one
    which is not understood is refused only where it is read.
    """
    kind, size = _kind_of_mask(mask_function)
    if kind is None:
        unread = torch.ones((batch_size, kv_length), dtype=torch.bool, device=kwargs.get("device"))
        return mask_marker(unread, _mask_name(mask_function), 0)
    if attention_mask is None:
        raise UnsupportedModelError("a mask was made without the padding mask of the call")
    return mask_marker(attention_mask, kind, size)


# Overlays of the causal mask: their name in transformers, and where they keep their size.
_OVERLAYS = {
    "sliding_window_overlay": ("sliding", "sliding_window"),
    "chunked_overlay": ("chunked", "chunk_size"),
}


def _kind_of_mask(mask_function: Any) -> tuple[str | None, int]:
    """What the marker says of a mask; the kind is None if it is not understood."""
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return "causal", 0
    if not mask_function.__qualname__.startswith("and_masks.<locals>"):
        return None, 0
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    others = [part for part in parts if part is not masking_utils.causal_mask_function]
    if len(parts) != 2 or len(others) != 1:
        return None, 0
    maker, _, made = others[0].__qualname__.partition(".<locals>")
    if not made or maker not in _OVERLAYS:
        return None, 0
    kind, size = _OVERLAYS[maker]
    return kind, int(inspect.getclosurevars(others[0]).nonlocals[size])


def _mask_name(mask_function: Any) -> str:
    """What to call a mask function in an error: its parts too, if it is made of others."""
    name = getattr(mask_function, "__qualname__", repr(mask_function)).split(".<locals>")[0]
    if name in ("and_masks", "or_masks"):
        parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
        name += f"({', '.join(map(_mask_name, parts))})"
    return name


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask_forward)


class _PackedForward(nn.Module):
    """The call that is traced: packed tokens in, logits of the selected rows out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = takes_positions(model)
        self.selects_rows = _selects_rows(model)
        if not self.selects_rows:  # its head then gets no more than the rows
            head: Any = model.get_output_embeddings()  # pyright: ignore
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, self.rows],))

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, logits_indices: torch.Tensor
    ) -> torch.Tensor:
        input_ids = input_ids.unsqueeze(0)
        arguments = {}
        if self.takes_positions:
            arguments["position_ids"] = positions.unsqueeze(0)
        if self.selects_rows:
            arguments["logits_to_keep"] = logits_indices
        self.rows = logits_indices
        # A padding mask keeps transformers from guessing packed sequences out of the positions.
        output = self.model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
            **arguments,
        )
        return output.logits.squeeze(0)


def _selects_rows(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def takes_positions(model: Any) -> bool:
    """Whether positions can be given to a model; if not, it numbers the columns of a call."""
    return "position_ids" in inspect.signature(model.forward).parameters


def longest_sequence(model: Any) -> int | None:
    """Tokens that a sequence may have, or None if the model does not say."""
    return min((limit for limit, _ in _length_limits(model)), default=None)


def why_not_longer(model: Any) -> str:
    """What ends the longest sequence."""
    return min(_length_limits(model))[1]


def _length_limits(model: Any) -> list[tuple[int, str]]:
    """Limits of a sequence's length, and why they are.

    Up to a length that they name, frequencies that follow the largest position stay as they were
    made, and sequences share calls. Beyond it they depend on what shares the call.
    """
    config = model.config.get_text_config()
    named = (getattr(config, "max_position_embeddings", None), "the model's limit")
    if not isinstance(named[0], int):
        named = (getattr(config, "max_target_positions", None), named[1])
    limits: list[tuple[Any, str]] = [named]
    for _, module, kind, _, layer_type in _changing_ropes(model):
        if kind == "longrope":
            parameters: Any = module.config.rope_parameters  # pyright: ignore
            parameters = parameters[layer_type] if layer_type else parameters
            limit = parameters["original_max_position_embeddings"]
        else:
            limit = module.original_max_seq_len
        limits.append((limit, f"beyond it, RoPE of type {kind!r} takes other frequencies"))
    return [(limit, why) for limit, why in limits if isinstance(limit, int)]


def check_model(model: Any, *, shapes_only: bool = False) -> None:
    """Raise UnsupportedModelError unless `model` is a decoder-only LM on one real device.

    shapes_only: it may be on the meta device.
    """
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"fastgen.optimize needs a transformers PreTrainedModel, got {name}"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only decoders generate")
    if not model.can_generate():
        raise UnsupportedModelError(f"{name} has no language modelling head to generate with")
    devices = Counter(parameter.device for parameter in model.parameters())
    if not shapes_only and any(device.type == "meta" for device in devices):
        raise UnsupportedModelError(
            f"{name} has {devices[torch.device('meta')]} parameters on the meta device (offloaded "
            "or not loaded); load all of them into memory first"
        )
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"{name} is split over {', '.join(map(str, devices))}; put it on one device first"
        )
    _check_layer_kinds(model)
    _check_rope(model)
    if not _selects_rows(model) and not isinstance(model.get_output_embeddings(), nn.Linear):
        raise UnsupportedModelError(
            f"{name}.forward takes no logits_to_keep and has no single linear head, so that it "
            "would compute the logits of every token of a prompt"
        )
    if hooked := hooked_modules(model):
        raise UnsupportedModelError(
            f"forward hooks or replaced forwards on {', '.join(hooked[:3])} would be skipped; "
            "remove them first"
        )
    if model.config._attn_implementation == ATTENTION_NAME:
        raise UnsupportedModelError(
            f"{name} has attn_implementation={ATTENTION_NAME!r}, which is for capture only"
        )


def _check_layer_kinds(model: Any) -> None:
    """Refuse layers that are no plain attention (recurrent, convolutional, indexed)."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    others: dict[str, list[int]] = {}
    for layer, kind in enumerate(kinds or ()):
        if kind not in _LAYER_KINDS:
            others.setdefault(kind, []).append(layer)
    if others:
        listed = ", ".join(f"{kind} (layers {layers})" for kind, layers in others.items())
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers of a kind that is not understood: {listed}"
        )


def _changing_ropes(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, str, str | None]]:
    """Rotary embeddings whose frequencies follow the largest position of a call.

    Of each: name, module, kind, the prefix of its buffers, the kind of layers that it is for.
    """
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                yield name, module, kind, f"{layer_type}_" if layer_type else "", layer_type


def _check_rope(model: nn.Module) -> None:
    """Refuse frequencies that change with length if those of short sequences are not kept."""
    for name, module, kind, prefix, _ in _changing_ropes(model):
        buffers = dict(module.named_buffers(recurse=False))
        if not {f"{prefix}inv_freq", f"{prefix}original_inv_freq"} <= set(buffers):
            raise UnsupportedModelError(
                f"{name} is RoPE of type {kind!r}, whose frequencies depend on the longest "
                "sequence of a call, and does not keep those of short sequences"
            )


def _keep_short_frequencies(clone: nn.Module) -> dict[str, str]:
    """Let RoPE that changes with length be what it is for short sequences.

    Returns: buffers that are read -> the live model's buffers that they are. Of the two names of
        one tensor torch.export may take either.
    """
    read = {}
    for name, module, _, prefix, layer_type in list(_changing_ropes(clone)):
        changing, kept = f"{prefix}inv_freq", f"{prefix}original_inv_freq"
        module.register_buffer(changing, module.get_buffer(kept), persistent=False)
        kinds: Any = module.rope_type
        module.rope_type = {**kinds, layer_type: "default"} if layer_type else "default"  # pyright: ignore
        read[f"{name}.{changing}"] = f"{name}.{kept}"
    return read


def capture(model: Any, *, shapes_only: bool = False) -> CapturedGraph:
    """Trace a model's forward over packed tokens into one graph.

    The model is not touched: what is traced is a copy of its modules over the same parameters.
    The graph is run twice on 8 tokens, to see that nothing but attention joins tokens; not with
    shapes_only, for a model on the meta device, whose graph can be looked at and never run.

    Raises: UnsupportedModelError, naming what is not understood.
    """
    check_model(model, shapes_only=shapes_only)
    autocast_device = "cpu" if shapes_only else _device(model).type  # there is none for meta
    with (
        _capture_lock,
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(autocast_device, enabled=False),
    ):
        _register()
        captured = _lift(model, *_export(model))
        _check_mutations(captured)
        _resolve_masks(captured)
        number_by_position(captured, every_count=not takes_positions(model))
        share_keys(captured)
        _check_layers(model, captured)
        _check_kept_tokens(model, captured)
        if not shapes_only:
            start = time.perf_counter()
            captured.keeps_sequences_apart = check_packing(model, captured)
            captured.check_seconds = time.perf_counter() - start
    return captured


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _export(model: nn.Module) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """The traced call, and which buffers are others of the live model."""
    shared = {id(t): _exportable(t) for t in (*model.parameters(), *model.buffers())}
    try:
        clone: Any = copy.deepcopy(model, shared)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied for capture: {type(error).__name__}: {error}"
        ) from error
    clone.eval()
    for module in clone.modules():  # what does nothing without gradients, on one device
        if places_inputs(module):
            del module.forward
        for key, hook in list(module._forward_hooks.items()):
            if marks_gradients(hook):
                del module._forward_hooks[key]
    if clone.config._attn_implementation == "eager":  # which looks at masks, not at flags
        for module in clone.modules():
            if getattr(module, "is_causal", None) is False:
                module.is_causal = True
    clone.set_attn_implementation(ATTENTION_NAME)
    if clone.config.get_text_config()._attn_implementation != ATTENTION_NAME:
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention code of its own that cannot be replaced"
        )
    # More rows than one, other than tokens: sizes that are equal would be taken for the same.
    example = {
        "input_ids": torch.arange(8, device=_device(model)),
        "positions": torch.arange(8, device=_device(model)),
        "logits_indices": torch.tensor([1, 4, 6], device=_device(model)),
    }
    try:
        read = _keep_short_frequencies(clone)
        return trace(_PackedForward(clone), example, ("input_ids", "positions")), read
    except UnsupportedModelError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be traced into one graph: "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        ) from error


def _exportable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; export refuses those made under inference_mode: another over the same memory."""
    if not tensor.is_inference():
        return tensor
    normal = torch.from_dlpack(tensor.detach())
    parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(normal, requires_grad=False) if parameter else normal


def _lift(
    model: nn.Module, program: torch.export.ExportedProgram, read: dict[str, str]
) -> CapturedGraph:
    """The exported graph in fastgen's form: what each placeholder is, one output."""
    from torch.export.graph_signature import InputKind

    kinds = {
        InputKind.PARAMETER: "parameter",
        InputKind.BUFFER: "buffer",
        InputKind.CONSTANT_TENSOR: "constant",
        InputKind.USER_INPUT: "batch",
    }
    inputs: dict[str, InputSpec] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind not in kinds:
            raise UnsupportedModelError(f"graph input {spec.arg} of kind {spec.kind} is unknown")
        target = (spec.target or spec.arg.name).removeprefix("model.")
        target = read.get(target, target)
        inputs[spec.arg.name] = InputSpec(kinds[spec.kind], target)  # pyright: ignore
    outputs = program.graph_signature.output_specs
    if len(outputs) != 1 or outputs[0].kind.name != "USER_OUTPUT":
        raise UnsupportedModelError(
            f"the forward changes {[spec.target for spec in outputs if spec.target]} as it runs"
        )
    module = fx.GraphModule(program.graph_module, program.graph_module.graph)
    output = next(node for node in module.graph.nodes if node.op == "output")
    output.args = (output.args[0][0],)  # pyright: ignore
    assert tuple(spec.target for spec in inputs.values() if spec.kind == "batch") == BATCH_INPUTS
    return CapturedGraph(
        module=module,
        inputs=inputs,
        num_layers=model.config.get_text_config().num_hidden_layers,  # pyright: ignore
        constants={name.removeprefix("model."): value for name, value in program.constants.items()},
        parameter_refusals=_parameter_refusals(model),
    )


def _check_mutations(captured: CapturedGraph) -> None:
    """Refuse a forward that writes into its own parameters or buffers.

    What it writes depends on all tokens of the call (longrope RoPE picks its frequencies by the
    largest position), and here those belong to different sequences.
    """
    for node in captured.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, fx.Node) and value.name in captured.inputs:
                name = captured.inputs[value.name].target
                raise UnsupportedModelError(f"the forward changes {name} as it runs")


def _resolve_masks(captured: CapturedGraph) -> None:
    """Turn the marker that reaches each attention into window or chunk; refuse any other mask."""
    for node in captured.graph.nodes:
        if node.target is not torch.ops.fastgen.attention.default:
            continue
        marker, layer_idx, given = node.args[3], node.args[8], node.args[5]
        if marker.target is not torch.ops.fastgen.mask_marker.default:
            raise UnsupportedModelError(
                f"the mask of layer {layer_idx} is computed by the model ({marker.target})"
            )
        kind, size = marker.args[1:]
        if kind not in ("causal", "sliding", "chunked"):
            raise UnsupportedModelError(
                f"layer {layer_idx}: mask function {kind} is neither causal nor a sliding window "
                "nor in chunks"
            )
        window, chunk = (0, size) if kind == "chunked" else (size, 0)
        if given and given != window:
            raise UnsupportedModelError(
                f"layer {layer_idx} has sliding_window={given} and a mask with window {window}"
            )
        settings = (node.args[4], window, *node.args[6:9])
        node.args = (*node.args[:3], None, *settings, *((chunk,) if chunk else ()))
    captured.graph.eliminate_dead_code()
    for node in captured.graph.nodes:
        if node.target is torch.ops.fastgen.mask_marker.default:
            raise UnsupportedModelError(f"the mask is read by {[str(user) for user in node.users]}")


def _check_layers(model: nn.Module, captured: CapturedGraph) -> None:
    """Every layer must have shown exactly one attention, in the layers' order."""
    order = [
        node.args[8]
        for node in captured.graph.nodes
        if node.target is torch.ops.fastgen.attention.default
    ]
    found = Counter(order)
    missing = [layer for layer in range(captured.num_layers) if found[layer] == 0]
    if missing or sum(found.values()) != captured.num_layers:
        twice = [layer for layer, count in found.items() if count > 1]
        raise UnsupportedModelError(
            f"{type(model).__name__} has {captured.num_layers} layers, and {sum(found.values())} "
            f"attentions were seen; layers without: {missing}, with more than one: {twice}"
        )
    if order != sorted(order):
        raise UnsupportedModelError(f"{type(model).__name__} runs its layers in the order {order}")


def _check_kept_tokens(model: Any, captured: CapturedGraph) -> None:
    """Refuse a layer whose cache, in transformers' loop, forgets tokens that its mask shows.

    generate() then differs from the forward (Moshi has a window in its cache only).
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for node in captured.graph.nodes:
        if node.target is not torch.ops.fastgen.attention.default:
            continue
        window, layer_idx, chunk = node.args[5], node.args[8], next(iter(node.args[9:]), 0)
        if layer_idx >= len(cache.layers):
            continue  # it reads the keys of an earlier layer
        kept = getattr(cache.layers[layer_idx], "sliding_window", None)
        if kept and not 0 < (chunk or window) <= kept:
            mask = f"chunks of {chunk}" if chunk else f"window {window}"
            raise UnsupportedModelError(
                f"layer {layer_idx} has a mask with {mask}, and in transformers' loop its cache "
                f"keeps {kept} tokens"
            )


def _parameter_refusals(model: nn.Module) -> dict[str, str]:
    """Parameters whose memory must not be moved, with the reason."""
    refusals: dict[str, str] = {}
    by_storage: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if type(parameter) is not nn.Parameter:
            refusals[name] = f"is a {type(parameter).__name__}"
        elif parameter.is_inference():
            refusals[name] = "was made under inference_mode"
        else:
            storage = parameter.untyped_storage()  # on the meta device it has no address
            by_storage.setdefault(storage.data_ptr() or storage._cdata, []).append(name)
    for names in by_storage.values():
        for name in names if len(names) > 1 else ():
            refusals[name] = f"shares its memory with {', '.join(set(names) - {name}) or 'itself'}"
    return refusals
