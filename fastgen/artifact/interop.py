"""The rewritten graph as a standard torch.export program, for other compilers and runtimes.

Nothing in it is compiled and nothing of fastgen's is left: ops are written in ATen, weights are the
program's parameters under their own names, and a batch's tensors and the caches are its arguments.
`torch.export.load` opens it where there is torch alone. A step writes into the caches it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as _symbolic
from torch import fx, nn

from ..compiled import rewrite
from ..errors import UnsupportedModelError
from ..passes import CapturedGraph, InputSpec
from .aten_ops import aten_body

# What makes weights of its own out of the model's: these passes must be off.
PASSES_OFF = ("merge_linears", "pack_gated_linears", "pack_linears")
_NOT_SAVED = ("merged", "packed")
_EXAMPLE_SIZES = {"num_tokens": 7, "num_seqs": 3, "num_rows": 5, "width": 2}
_EXAMPLE_BLOCKS, _EXAMPLE_BLOCK_SIZE = 11, 16


def graph_and_weights(
    model: nn.Module, passes_off: Sequence[str] = ()
) -> tuple[CapturedGraph, dict[InputSpec, torch.Tensor]]:
    """What `export_graph` takes, of a live model. Raises: UnsupportedModelError."""
    from ..capture import capture  # with all of transformers

    graph, _ = rewrite(capture(model), (*PASSES_OFF, *passes_off))
    weights: dict[InputSpec, torch.Tensor] = {}
    for spec in graph.inputs.values():
        if spec.kind == "parameter":
            weights[spec] = model.get_parameter(spec.target)
        elif spec.kind == "buffer":
            weights[spec] = model.get_buffer(spec.target)
    return graph, weights


@torch.inference_mode(False)  # tensors that were made in it cannot be exported
@torch.no_grad()
def export_graph(
    graph: CapturedGraph, weights: Mapping[InputSpec, torch.Tensor], path: Path
) -> None:
    """Write a graph that `rewrite` made with PASSES_OFF.

    Args:
        weights: The tensors of all parameters and buffers among the graph's inputs.
        path: `*.pt2`; replaced if it is there.
    Raises: UnsupportedModelError if torch.export cannot express the graph.
    """
    specs = list(graph.inputs.values())
    assert not any(spec.kind in _NOT_SAVED for spec in specs), f"{PASSES_OFF} must be off"
    module = _standalone(graph, weights)
    given = {
        node.name: _example(graph.inputs[node.name], node.meta["val"])
        for node in graph.placeholders()
        if graph.inputs[node.name].kind in ("batch", "cache")
    }
    varying = {
        node.name: {
            dim: torch.export.Dim.AUTO
            for dim, size in enumerate(node.meta["val"].shape)
            if not isinstance(size, int)
        }
        for node in graph.placeholders()
        if node.name in given
    }
    try:
        with _symbolic.patch(backed_size_oblivious=True):  # pyright: ignore  # a size may be 1
            program = torch.export.export(module, (), given, dynamic_shapes=varying, strict=False)
        _allow_ones(program)
        program._example_inputs = None  # they would be pickled
        torch.export.save(program, path)
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise UnsupportedModelError(
            f"torch.export cannot express the rewritten graph ({type(error).__name__}: "
            f"{lines[0] if lines else ''})"
        ) from error


def _standalone(graph: CapturedGraph, weights: Mapping[InputSpec, torch.Tensor]) -> fx.GraphModule:
    """The graph with its weights inside, and no op of fastgen's."""
    copy = graph.copy()
    for node in copy.placeholders():
        spec = copy.inputs[node.name]
        if spec.kind in ("batch", "cache"):
            continue
        if spec.kind == "constant":
            name, tensor = f"constants.{node.name}", graph.constants[spec.target]
        else:
            name, tensor = spec.target, weights[spec]
        _place(copy.module, name, tensor, is_parameter=spec.kind == "parameter")
        with copy.graph.inserting_before(node):
            node.replace_all_uses_with(copy.graph.get_attr(name))
        copy.graph.erase_node(node)
    for node in copy.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and (body := aten_body(schema.name)) is not None:
            node.target = body
        elif schema is not None and not schema.name.startswith("aten::"):
            raise UnsupportedModelError(f"the graph calls {schema.name}, which is no op of torch's")
        node.meta = {}  # of another trace
    first = next(node for node in copy.graph.nodes if node.op != "placeholder")
    for node in [node for node in copy.graph.nodes if node.op == "placeholder"]:
        first.prepend(node)  # arguments come before what is read from the module
    copy.module.recompile()
    return copy.module


def _place(root: nn.Module, name: str, tensor: torch.Tensor, *, is_parameter: bool) -> None:
    """Give a module tree a tensor by its qualified name."""
    *path, last = name.split(".")
    module: Any = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if is_parameter:  # without gradients, whose graph would grow in the caches
        setattr(module, last, nn.Parameter(tensor.detach(), requires_grad=False))
    else:
        module.register_buffer(last, tensor.detach())


def _example(spec: InputSpec, value: torch.Tensor) -> torch.Tensor:
    """A step of three sequences; every size that varies is another number, and none is 1."""
    sizes = _EXAMPLE_SIZES
    tokens, seqs = sizes["num_tokens"], sizes["num_seqs"]
    if spec.kind == "cache":
        shape = [*value.shape]
        shape[0], shape[2] = _EXAMPLE_BLOCKS, _EXAMPLE_BLOCK_SIZE
        return torch.zeros(shape, dtype=value.dtype, device=value.device)
    match spec.target:
        case "logits_indices":
            shape = [sizes["num_rows"]]
        case "seq_lens":
            shape = [seqs]
        case "query_start_loc":
            shape = [seqs + 1]
        case "block_table":
            shape = [seqs, sizes["width"]]
        case _:  # one row per token
            shape = [tokens, *value.shape[1:]]
    return torch.zeros(shape, dtype=value.dtype, device=value.device)


def _allow_ones(program: torch.export.ExportedProgram) -> None:
    """A trace of sizes that are not 1 holds for 1, too: whatever is broadcast is so by its own 1.

    What remains to be checked at every call is which sizes are equal.
    """
    program._guards_code = [guard for guard in program._guards_code if " != " not in guard]
