"""A Hugging Face causal LM becomes one graph. The only file that knows Hugging Face's names.

The model is called once, under torch.export, with flat packed tokens and no cache. Attention is
found by registration, not by pattern: transformers hands every attention call to the function
registered as "fastgen", which emits one `fastgen::attention`. Masks are found the same way: the
registered mask function emits a marker that names the kind of mask, and the marker's way through
the graph says which layer has which.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
import time
from collections import Counter
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx, nn

from .errors import UnsupportedModelError
from .fingerprint import hooked_modules, marks_gradients, places_inputs
from .packing_check import check_packing
from .passes import BATCH_INPUTS, CapturedGraph, InputSpec

ATTENTION_NAME = "fastgen"

# Passed through to attention by the models, and without effect on a forward without a cache:
# positions have been applied by RoPE, the rest says what to return.
_IGNORED_KWARGS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_router_logits",
    "logits_to_keep",
}

# Kinds of layers, by the names that configurations give them, that attend to all earlier tokens or
# to a window of them and keep nothing else. Which window, the masks say.
_LAYER_KINDS = {"full_attention", "sliding_attention", "attention"}

# How models number the tokens of a call, beginning at 0.
_COUNTING = {
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
}

# What the attention that the captured model would use without fastgen does not look at.
_lost: ContextVar[frozenset[str]] = ContextVar("lost", default=frozenset())

# torch.export keeps global state: one capture at a time in a process.
_capture_lock = threading.Lock()


@torch.library.custom_op("fastgen::mask_marker", mutates_args=())
def mask_marker(padding_mask: torch.Tensor, kind: str, window: int) -> torch.Tensor:
    """Stands for a mask in a captured graph; resolved before the graph can run.

    Args:
        padding_mask: [1, num_tokens] bool. window: Keys seen by a query, 0: all.
        kind: "causal", or the name of a mask function that is not understood.
    Raises: RuntimeError if it is ever run.
    """
    raise RuntimeError("a mask marker was left in a graph that runs")


@mask_marker.register_fake
def _(padding_mask, kind, window):
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
    softcap = None if "softcap" in _lost.get() else softcap
    s_aux = None if "s_aux" in _lost.get() else s_aux
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


def _lost_arguments(own: str) -> frozenset[str]:
    """What transformers' own attention of a model takes and does not look at, by trying it.

    Its sdpa drops what it does not know: soft capping, in releases that let Gemma 2 use it.
    """
    from transformers import AttentionInterface

    if own != "sdpa":
        return frozenset()
    sdpa, one, lost = AttentionInterface()["sdpa"], torch.ones(1, 1, 1, 1), set()
    for name, value in (("softcap", 1.0), ("s_aux", torch.zeros(1))):
        if name not in inspect.signature(sdpa).parameters:
            with contextlib.suppress(ValueError):  # newer ones say that they cannot
                sdpa(nn.Module(), one, one, one, None, **{name: value})
                lost.add(name)
    return frozenset(lost)


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
    window = _causal_window(mask_function)
    if window is None:
        unread = torch.ones((batch_size, kv_length), dtype=torch.bool, device=kwargs.get("device"))
        return mask_marker(unread, _mask_name(mask_function), 0)
    if attention_mask is None:
        raise UnsupportedModelError("a mask was made without the padding mask of the call")
    return mask_marker(attention_mask, "causal", window)


def _causal_window(mask_function: Any) -> int | None:
    """0 for the plain causal mask, the window of a sliding one, None for anything else."""
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return 0
    if not mask_function.__qualname__.startswith("and_masks.<locals>"):
        return None
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    others = [part for part in parts if part is not masking_utils.causal_mask_function]
    if len(parts) != 2 or len(others) != 1:
        return None
    if not others[0].__qualname__.startswith("sliding_window_overlay.<locals>"):
        return None
    return int(inspect.getclosurevars(others[0]).nonlocals["sliding_window"])


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

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, logits_indices: torch.Tensor
    ) -> torch.Tensor:
        input_ids = input_ids.unsqueeze(0)
        arguments = {}
        if self.takes_positions:
            arguments["position_ids"] = positions.unsqueeze(0)
        if self.selects_rows:
            arguments["logits_to_keep"] = logits_indices
        else:  # its head gets no more than these rows
            head: Any = self.model.get_output_embeddings()  # pyright: ignore
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, logits_indices],))
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
    """Positions that a model has, or None if its configuration does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "max_target_positions"):
        if isinstance(limit := getattr(config, name, None), int):
            return limit
    return None


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
    """Refuse layers that are no plain attention (recurrent, convolutional, indexed, chunked)."""
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


def _check_rope(model: nn.Module) -> None:
    """Refuse frequencies that follow the largest position of a call: many sequences share it."""
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                raise UnsupportedModelError(
                    f"{name} is RoPE of type {kind!r}, whose frequencies depend on the longest "
                    "sequence of a call"
                )


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
        program = _export(model)
        captured = _lift(model, program)
        _check_mutations(captured)
        _resolve_masks(captured)
        if not takes_positions(model):
            _number_by_positions(captured)
        _check_layers(model, captured)
        _check_kept_tokens(model, captured)
        if not shapes_only:
            start = time.perf_counter()
            captured.keeps_sequences_apart = check_packing(model, captured)
            captured.check_seconds = time.perf_counter() - start
    return captured


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _export(model: nn.Module) -> torch.export.ExportedProgram:
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
    own = clone.config.get_text_config()._attn_implementation
    _lost.set(_lost_arguments(own))
    if own == "eager":  # which looks at masks, not at flags
        for module in clone.modules():
            if getattr(module, "is_causal", None) is False:
                module.is_causal = True
    clone.set_attn_implementation(ATTENTION_NAME)
    if clone.config.get_text_config()._attn_implementation != ATTENTION_NAME:
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention code of its own that cannot be replaced"
        )
    num_tokens, num_rows = torch.export.Dim("num_tokens", min=2), torch.export.Dim.AUTO
    # More rows than one, other than tokens: sizes that are equal would be taken for the same.
    example = {
        "input_ids": torch.arange(8, device=_device(model)),
        "positions": torch.arange(8, device=_device(model)),
        "logits_indices": torch.tensor([1, 4, 6], device=_device(model)),
    }
    dynamic = {
        "input_ids": {0: num_tokens},
        "positions": {0: num_tokens},
        "logits_indices": {0: num_rows},
    }
    try:
        return torch.export.export(
            _PackedForward(clone), (), example, dynamic_shapes=dynamic, strict=False
        )
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


def _lift(model: nn.Module, program: torch.export.ExportedProgram) -> CapturedGraph:
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
    """Turn the marker that reaches each attention into its window; refuse any other mask."""
    for node in captured.graph.nodes:
        if node.target is not torch.ops.fastgen.attention.default:
            continue
        marker, layer_idx, given = node.args[3], node.args[8], node.args[5]
        if marker.target is not torch.ops.fastgen.mask_marker.default:
            raise UnsupportedModelError(
                f"the mask of layer {layer_idx} is computed by the model ({marker.target})"
            )
        kind, window = marker.args[1:]
        if kind != "causal":
            raise UnsupportedModelError(
                f"layer {layer_idx}: mask function {kind} is neither causal nor a sliding window"
            )
        if given and given != window:
            raise UnsupportedModelError(
                f"layer {layer_idx} has sliding_window={given} and a mask with window {window}"
            )
        node.args = (*node.args[:3], None, node.args[4], window, *node.args[6:])
    captured.graph.eliminate_dead_code()
    for node in captured.graph.nodes:
        if node.target is torch.ops.fastgen.mask_marker.default:
            raise UnsupportedModelError(f"the mask is read by {[str(user) for user in node.users]}")


def _number_by_positions(captured: CapturedGraph) -> None:
    """Where a model counts the tokens of a call itself, it reads their positions instead.

    For one sequence alone the two are the same; that nothing else depends on the place in the call
    is what the packing check shows.
    """
    positions = next(
        node for node in captured.placeholders() if captured.inputs[node.name].target == "positions"
    )
    value = positions.meta["val"]
    for node in list(captured.graph.nodes):
        made = node.meta.get("val")
        if (
            node.target in _COUNTING
            and made.dtype == value.dtype
            and str(made.shape) == str(value.shape)
        ):
            node.replace_all_uses_with(positions)
    captured.graph.eliminate_dead_code()


def _check_layers(model: nn.Module, captured: CapturedGraph) -> None:
    """Every layer must have shown exactly one attention."""
    found = Counter(
        node.args[8]
        for node in captured.graph.nodes
        if node.target is torch.ops.fastgen.attention.default
    )
    missing = [layer for layer in range(captured.num_layers) if found[layer] == 0]
    if missing or sum(found.values()) != captured.num_layers:
        twice = [layer for layer, count in found.items() if count > 1]
        raise UnsupportedModelError(
            f"{type(model).__name__} has {captured.num_layers} layers, and {sum(found.values())} "
            f"attentions were seen; layers without: {missing}, with more than one: {twice}"
        )


def _check_kept_tokens(model: Any, captured: CapturedGraph) -> None:
    """Refuse a layer whose cache, in transformers' loop, forgets tokens that its mask shows.

    generate() then differs from the forward (Moshi has a window in its cache only).
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for node in captured.graph.nodes:
        if node.target is not torch.ops.fastgen.attention.default:
            continue
        window, layer_idx = node.args[5], node.args[8]
        if layer_idx >= len(cache.layers):
            continue  # it reads the keys of an earlier layer
        kept = getattr(cache.layers[layer_idx], "sliding_window", None)
        if kept and not 0 < window <= kept:
            raise UnsupportedModelError(
                f"layer {layer_idx} has a mask with window {window}, and in transformers' loop its "
                f"cache keeps {kept} tokens"
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
