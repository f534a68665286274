"""From a model to its graph: copy, trace, understand, compare."""

from __future__ import annotations

import inspect
import threading
import time
from typing import Any

import torch
from torch import fx, nn

from ..errors import UnsupportedModelError
from ..fingerprint import marks_gradients, places_inputs
from ..passes import BATCH_INPUTS, EMBEDS_INPUTS, PLAIN, CapturedGraph, InputSpec, Variant
from ..passes.graph import take_over_ops
from ..wrappers import copy_of_modules
from .attention import register, set_attention
from .graph_checks import check_kept_tokens, check_layers, check_mutations, resolve_masks
from .own_attention import replace_own_attention
from .packed_forward import PackedForward
from .packing_check import check_logits, check_packing, check_width, tensor_of
from .places import number_by_position
from .shared_keys import share_keys
from .supported import check_model, keep_short_frequencies, longest_sequence, takes_positions
from .tracing import trace

# Of sequences over which masks are looked at, where a model does not say how long they get.
_UNKNOWN_LENGTH = 2048
# Tokens of the two sequences for which a graph is compared with the model itself.
_COMPARED_TOKENS = 5

# torch.export keeps global state: one capture at a time in a process.
_capture_lock = threading.Lock()


def capture(model: Any, variant: Variant = PLAIN, *, shapes_only: bool = False) -> CapturedGraph:
    """Trace a model's forward over packed tokens into one graph.

    The model is not touched: what is traced is a copy of its modules over the same parameters.
    The graph is run twice on 8 tokens, to see that nothing but attention joins tokens, and once
    beside the model's own forward; not with shapes_only, for a model on the meta device, whose
    graph can be looked at and never run.

    Args:
        variant: What the graph takes and gives besides tokens and logits.
    Raises: UnsupportedModelError, naming what is not understood.
    """
    check_model(model, shapes_only=shapes_only)
    if variant.prompt_embeds:
        _check_takes_embeds(model)
    autocast_device = "cpu" if shapes_only else _device(model).type  # there is none for meta
    with (
        _capture_lock,
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(autocast_device, enabled=False),
    ):
        register()
        clone = _clone(model)
        writes_attention = not set_attention(clone)
        program, read = _export(model, clone, variant, writes_attention)
        captured = _lift(model, program, variant, read)
        start = time.perf_counter()
        if writes_attention:
            _replace_own_attention(model, captured)
        check_mutations(captured)
        resolve_masks(captured)
        number_by_position(captured, every_count=not takes_positions(model))
        share_keys(captured)
        check_layers(model, captured)
        check_kept_tokens(model, captured)
        if writes_attention:
            check_width(model, captured, 2 * (longest_sequence(model) or _UNKNOWN_LENGTH))
        if not shapes_only:
            captured.keeps_sequences_apart = check_packing(model, captured)
            if variant == PLAIN:  # with which the engine compares the others
                _check_logits(model, captured, writes_attention)
            captured.check_seconds = time.perf_counter() - start
    return captured


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _check_takes_embeds(model: Any) -> None:
    name = type(model).__name__
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(f"{name}.forward takes no inputs_embeds")
    if not isinstance(getattr(model.get_input_embeddings(), "weight", None), torch.Tensor):
        raise UnsupportedModelError(f"the input embeddings of {name} have no weight")


def _clone(model: nn.Module) -> Any:
    """The model's modules in evaluation mode, over the same parameters and buffers."""
    clone = copy_of_modules(model, _exportable)
    for module in clone.modules():  # what does nothing without gradients, on one device
        if places_inputs(module):
            del module.forward
        for key, hook in list(module._forward_hooks.items()):
            if marks_gradients(hook):
                del module._forward_hooks[key]
    return clone


def _exportable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; export refuses those made under inference_mode: another over the same memory."""
    if not tensor.is_inference():
        return tensor
    normal = torch.from_dlpack(tensor.detach())
    parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(normal, requires_grad=False) if parameter else normal


def _export(
    model: nn.Module, clone: Any, variant: Variant, writes_attention: bool
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """The traced call, and which buffers are others of the live model."""
    # More rows than one, other than tokens: sizes that are equal would be taken for the same.
    example = {
        "input_ids": torch.arange(8, device=_device(model)),
        "positions": torch.arange(8, device=_device(model)),
        "logits_indices": torch.tensor([1, 4, 6], device=_device(model)),
    }
    if variant.prompt_embeds:
        weight = clone.get_input_embeddings().weight
        example["prompt_embeds"] = weight.new_zeros(8, weight.shape[-1])
        example["is_embed"] = torch.zeros(8, dtype=torch.bool, device=weight.device)
    tokens = tuple(name for name in example if name != "logits_indices")
    # Tables for masks end somewhere, until they have been replaced.
    up_to = (longest_sequence(model) or _UNKNOWN_LENGTH) if writes_attention else None
    try:
        read = keep_short_frequencies(clone)
        return trace(PackedForward(clone, variant), example, tokens, up_to), read
    except UnsupportedModelError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be traced into one graph: "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        ) from error


def _lift(
    model: nn.Module,
    program: torch.export.ExportedProgram,
    variant: Variant,
    read: dict[str, str],
) -> CapturedGraph:
    """The exported graph in fastgen's form: what each placeholder is, the logits first."""
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
    if any(spec.kind.name != "USER_OUTPUT" for spec in outputs):
        raise UnsupportedModelError(
            f"the forward changes {[spec.target for spec in outputs if spec.target]} as it runs"
        )
    module = fx.GraphModule(program.graph_module, program.graph_module.graph)
    take_over_ops(module.graph)
    output = next(node for node in module.graph.nodes if node.op == "output")
    results: Any = output.args[0]
    output.args = (results if variant.hidden_states else results[0],)
    batch = BATCH_INPUTS + (EMBEDS_INPUTS if variant.prompt_embeds else ())
    assert tuple(spec.target for spec in inputs.values() if spec.kind == "batch") == batch
    return CapturedGraph(
        module=module,
        inputs=inputs,
        num_layers=model.config.get_text_config().num_hidden_layers,  # pyright: ignore
        constants={name.removeprefix("model."): value for name, value in program.constants.items()},
        parameter_refusals=_parameter_refusals(model),
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


def _replace_own_attention(model: nn.Module, captured: CapturedGraph) -> None:
    def value_of(spec: InputSpec) -> torch.Tensor:
        value = tensor_of(model, captured, spec)
        if value.device.type == "meta":
            raise UnsupportedModelError(
                f"{type(model).__name__} has attention code of its own, which can only be "
                f"understood with the values of {spec.target}"
            )
        return value

    replace_own_attention(captured, value_of, longest_sequence(model) or _UNKNOWN_LENGTH)
    marker = torch.ops.fastgen.mask_marker.default
    if any(node.target is marker for node in captured.graph.nodes):
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention code of its own that cannot be replaced"
        )


def _check_logits(model: nn.Module, captured: CapturedGraph, writes_attention: bool) -> None:
    """Compare the graph with the forward of a copy in evaluation mode that nothing has changed."""
    plain: Any = _clone(model)
    with_positions = takes_positions(model)

    def forward(token_ids: torch.Tensor) -> torch.Tensor:
        input_ids = token_ids.unsqueeze(0)
        where = torch.arange(len(token_ids), device=token_ids.device).unsqueeze(0)
        given = {"position_ids": where} if with_positions else {}
        mask = torch.ones_like(input_ids)
        return plain(input_ids=input_ids, attention_mask=mask, use_cache=False, **given).logits[0]

    num_tokens = _COMPARED_TOKENS
    if writes_attention:  # beyond its windows
        attention = torch.ops.fastgen.attention.default
        windows = [n.args[5] for n in captured.graph.nodes if n.target is attention and n.args[5]]
        num_tokens = max([2 * _COMPARED_TOKENS, *(window + 8 for window in windows)])
    check_logits(model, captured, forward, num_tokens)
