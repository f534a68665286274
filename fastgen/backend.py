"""torch.compile(model, backend="fastgen"): the passes for anybody's own loop, without a cache.

Dynamo hands over a graph of torch functions. It is traced again into the dialect of captured
graphs, rewritten by the same passes, and run by the same kernels. Weights stay where they are, so
linears are not merged. Whatever is not certain to compute the same, autograd above all, runs as
Dynamo gave it; `reports()` says of every graph which of the two happened, and why.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves

from .compiled import choose_kernels
from .passes import PASSES, CapturedGraph, InputSpec, Report, run_passes
from .passes.graph import memory_of, take_over_ops, written_by
from .passes.pipeline import Pass
from .passes.replace_sdpa import replace_sdpa

logger = logging.getLogger("fastgen")
aten = torch.ops.aten

# A graph of Dynamo's has no managed cache, and its weights are not fastgen's to lay out.
_LEFT_OUT = ("merge_linears", "pack_gated_linears", "pack_linears", "insert_paged_cache")
_canonicalize, *_rewrites = (item for item in PASSES if item.name not in _LEFT_OUT)
BACKEND_PASSES: tuple[Pass, ...] = (_canonicalize, Pass(replace_sdpa), *_rewrites)


@dataclass(frozen=True)
class GraphReport:
    """What became of one of Dynamo's graphs.

    name: Dynamo's own "frame/recompilation" of it. unrewritten: why it runs as Dynamo gave it, or
    None if it was rewritten. report: passes and kernels, as far as they came.
    """

    name: str
    unrewritten: str | None
    report: Report = field(default_factory=Report)

    def __str__(self) -> str:
        state = f"runs as it is: {self.unrewritten}" if self.unrewritten else "rewritten"
        passes = self.report.passes
        done = [f"{item.name} {item.matches}" for item in passes if item.matches]
        reasons = Counter((item.name, why) for item in passes for _, why in item.refused)
        refused = [f"{name} refused {number}: {why}" for (name, why), number in reasons.items()]
        chosen = [
            f"{op} x {entry['calls']}: {name}"
            for op, entries in self.report.kernels.items()
            for name, entry in entries.items()
        ]
        return "; ".join([f"graph {self.name} {state}", *done, *chosen, *refused])


class _GraphForward:
    """What Dynamo calls for one graph; lives as long as Dynamo keeps the graph."""

    def __init__(self, report: GraphReport, forward: Callable[..., Any]) -> None:
        self.order = next(_order)
        self.report = report
        self._forward = forward

    def __call__(self, *args: Any) -> Any:
        return self._forward(*args)


_order = count()
_alive: weakref.WeakSet[_GraphForward] = weakref.WeakSet()


def reports() -> list[GraphReport]:
    """One report for every graph of this backend that Dynamo holds, the oldest first."""
    return [item.report for item in sorted(_alive, key=lambda item: item.order)]


def fastgen_backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that `torch.compile(..., backend="fastgen")` finds by its entry point.

    Args:
        options: {"passes_off": names of passes to leave out}, torch.compile's `options=`.
        mode: torch.compile's `mode=`; there are none but the default.
    Returns: a callable with the graph's own inputs and outputs.
    Raises: ValueError for an unknown option, pass or mode. A graph that cannot be rewritten raises
        nothing: it runs as it is, with the reason in `reports()`.
    """
    passes_off = _passes_off(options, mode)
    compile_id = CompileContext.current_compile_id()
    name = str(compile_id) if compile_id is not None else "of a direct call"
    forward, report = graph_module.forward, Report()
    unrewritten = _stays(graph_module)
    if unrewritten is None:
        try:
            # no_grad also puts the mode back if the graph switches gradients and then fails.
            with torch.no_grad():
                rewritten, report = _rewrite(graph_module, passes_off)
        except _StaysError as error:
            unrewritten = str(error)
        except Exception as error:
            lines = str(error).strip().splitlines()
            unrewritten = f"{type(error).__name__}: {lines[0] if lines else ''}"
            _warn_once(unrewritten)
        else:
            if any(item.matches for item in report.passes[1:]):
                forward = rewritten
            else:
                unrewritten = "no pass found anything to rewrite"
    graph_report = GraphReport(name, unrewritten, report)
    logger.info("%s", graph_report)
    compiled = _GraphForward(graph_report, forward)
    _alive.add(compiled)
    return compiled


def _passes_off(options: Mapping[str, Any] | None, mode: str | None) -> tuple[str, ...]:
    if mode not in (None, "default"):
        raise ValueError(f"the backend has no modes; got mode={mode!r}, leave it out")
    given = dict(options or {})
    passes_off = tuple(given.pop("passes_off", ()))
    if given:
        raise ValueError(f"options may hold passes_off; got {', '.join(map(repr, given))}")
    optional = [item.name for item in BACKEND_PASSES if not item.required]
    for name in passes_off:
        if name not in optional:
            raise ValueError(f"passes_off may name {', '.join(optional)}; got {name!r}")
    return passes_off


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("a compiled graph could not be rewritten and runs as it is: %s", reason)


def _stays(graph_module: fx.GraphModule) -> str | None:
    """Why this graph must run as Dynamo gave it, known before anything is traced, or None."""
    if torch._C._is_any_autocast_enabled():
        return "autocast is on"
    gradients = torch.is_grad_enabled() or any(
        node.target is torch._C._set_grad_enabled and node.args != (False,)
        for node in graph_module.graph.nodes
    )
    has_tensors = False
    for node in graph_module.graph.nodes:
        value = node.meta.get("example_value")
        if node.op in ("get_attr", "call_module"):
            return f"{node.target} is held by the graph itself"
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            has_tensors = True
            if not isinstance(value, FakeTensor):
                return f"the input {node.name} is a {type(value).__name__}"
        if isinstance(node.target, HigherOrderOperator):
            return f"{node.target} holds a graph of its own"
        if _changes_state(node.target):
            return f"{node.target.__name__} changes how ops run"  # pyright: ignore
        for tensor in _tensors(value):
            if gradients and tensor.requires_grad:
                return f"{node.name} requires gradients"
            if free_unbacked_symbols(tensor):
                return f"the size of {node.name} depends on data"
    return None if has_tensors else "it has no tensor inputs"


def _changes_state(target: Any) -> bool:
    """A region of autocast or inference mode, of a transform of functions, of a CUDA stream.

    Traced halfway, it would stay on.
    """
    module = getattr(target, "__module__", None) or ""
    if "functorch" in module or module.startswith("torch.cuda"):
        return True
    return getattr(target, "__name__", "").startswith(("_enter_", "_exit_"))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf


@dataclass
class _DynamoGraph(CapturedGraph):
    """A graph with Dynamo's outputs: a tuple of tensors, numbers and None."""

    def output_form(self) -> tuple[Any, Any]:
        """As of its class; a shape is a tensor's sizes, strides and whose memory it is."""
        owners: dict[int, str] = {}
        for node in self.placeholders():
            if (memory := memory_of(node)) is not None:
                owners.setdefault(memory, node.name)
        dtypes, shapes = [], []
        output = next(node for node in self.graph.nodes if node.op == "output")
        for index, item in enumerate(tree_leaves(output.args[0])):
            value = item.meta["val"] if isinstance(item, fx.Node) else item
            if isinstance(value, torch.Tensor):
                owner = owners.setdefault(memory_of(item), f"output {index}")  # pyright: ignore
                shapes.append((value.shape, _strides(value), owner))
                dtypes.append(value.dtype)
            else:
                shapes.append(value)
                dtypes.append(type(value))
        return dtypes, shapes


def _strides(value: torch.Tensor) -> list:
    """The strides that count: not those of dimensions of one element or of an empty tensor."""
    if any(isinstance(size, int) and size == 0 for size in value.shape):
        return []
    pairs = zip(value.shape, value.stride(), strict=True)
    return [stride for size, stride in pairs if not (isinstance(size, int) and size == 1)]


class _StaysError(ValueError):
    """The graph must not be rewritten, as the message says; nothing has gone wrong."""


def _rewrite(
    graph_module: fx.GraphModule, passes_off: Sequence[str]
) -> tuple[Callable[..., Any], Report]:
    """The rewritten graph as a callable with the inputs and outputs of `graph_module`."""
    captured = _retrace(graph_module)
    positions = {node.name: index for index, node in enumerate(captured.placeholders())}
    rewritten, report = run_passes(captured, passes_off, BACKEND_PASSES)
    if _moved_past_writes(_readings(captured), _readings(rewritten)):
        raise _StaysError("the graph writes into memory that rewritten ops read")
    if _random_ops(captured) != _random_ops(rewritten):
        raise _StaysError("a random op whose result is not used would be lost")
    lowered = rewritten.copy()
    report.kernels = choose_kernels(lowered)
    lowered.module.recompile()
    forward = lowered.module.forward
    given = [positions[name] for name, spec in rewritten.inputs.items() if spec.kind != "constant"]
    constants = [
        rewritten.constants[spec.target]
        for spec in rewritten.inputs.values()
        if spec.kind == "constant"
    ]
    return lambda *args: forward(*[args[index] for index in given], *constants), report


def _retrace(graph_module: fx.GraphModule) -> _DynamoGraph:
    """Dynamo's graph in ATen before decomposition: what capture makes of a model."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    values = [node.meta["example_value"] for node in placeholders]
    fake_mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    with fake_mode:
        module = make_fx(
            lambda *args: graph_module(*args), pre_dispatch=True, _allow_non_fake_inputs=True
        )(*values)
    for node in module.graph.nodes:
        if node.op == "call_function" and not _is_known(node.target):
            raise _StaysError(f"{node.target} is no ATen op")
    take_over_ops(module.graph)
    inputs = {}
    traced = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, given, value in zip(traced, placeholders, values, strict=True):
        kind = "parameter" if isinstance(value, torch.nn.Parameter) else "batch"
        inputs[node.name] = InputSpec(kind, given.name)
        node.meta["val"] = value  # the trace's copy of a number's tensor does not know its number
    captured = _DynamoGraph(module, inputs, num_layers=0)
    if any(node.op == "get_attr" for node in captured.graph.nodes):
        _lift_constants(captured, fake_mode)
    return captured.copy()  # which renames a few nodes; in copies of the copy they keep their names


def _lift_constants(captured: CapturedGraph, fake_mode: Any) -> None:
    """Tensors that the code created while it was traced become inputs, after those of Dynamo."""
    for node in [node for node in captured.graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        tensor = captured.constants[name] = getattr(captured.module, name)
        value = fake_mode.from_tensor(tensor, static_shapes=True)
        lifted = captured.add_input(f"constant_{name}", InputSpec("constant", name), value)
        node.replace_all_uses_with(lifted)
        captured.graph.erase_node(node)
    # The trace takes the copy that an op makes of a constant for the constant itself.
    captured.module.recompile()
    placeholders = captured.placeholders()
    values = [node.meta["val"] for node in placeholders]
    FakeTensorProp(captured.module, fake_mode).propagate_dont_convert_inputs(*values)
    for node, value in zip(placeholders, values, strict=True):
        node.meta["val"] = value


def _is_known(target: Any) -> bool:
    """An ATen op, arithmetic of sizes, or a switch of gradients, which none of the inputs need."""
    if isinstance(target, OpOverload) or target is torch._C._set_grad_enabled:
        return True
    module = getattr(target, "__module__", None) or ""
    return module in ("_operator", "math") or getattr(target, "__name__", "").startswith("sym_")


def _random_ops(captured: CapturedGraph) -> set[str]:
    """The ops that draw random numbers."""
    return {node.name for node in captured.graph.nodes if _draws(node)}


def _draws(node: fx.Node) -> bool:
    match node.target:
        case aten.dropout.default:
            return bool(node.args[2])
        case aten.scaled_dot_product_attention.default:
            return bool(node.kwargs.get("dropout_p") or node.args[4:5] not in ((), (0.0,)))
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _readings(captured: CapturedGraph) -> dict[tuple[str, int], dict[str, int]]:
    """Of all memory that is written: who reads it, and after how many writes.

    The memory is named by the op that first writes it and the number of its argument; views, which
    compute nothing, do not count as readers.
    """
    names: dict[int | None, tuple[str, int]] = {}
    for node in captured.graph.nodes:
        for index, written in enumerate(written_by(node)):
            names.setdefault(memory_of(written), (node.name, index))
    readings: dict[tuple[str, int], dict[str, int]] = {name: {} for name in names.values()}
    writes: Counter[int | None] = Counter()
    for node in captured.graph.nodes:
        written = {memory_of(read) for read in written_by(node)}
        for read in node.all_input_nodes:
            memory = memory_of(read)
            if memory in names and (memory != memory_of(node) or written):
                readings[names[memory]][node.name] = writes[memory]
        writes.update(written)
    return readings


def _moved_past_writes(
    before: dict[tuple[str, int], dict[str, int]], after: dict[tuple[str, int], dict[str, int]]
) -> bool:
    """Whether ops that were replaced read what their replacements may find overwritten."""
    if before.keys() != after.keys():
        return True
    for name, old in before.items():
        new = after[name]
        if any(old[node] != new[node] for node in old.keys() & new.keys()):
            return True
        gone, come = old.keys() - new.keys(), new.keys() - old.keys()
        if len({old[node] for node in gone} | {new[node] for node in come}) > 1:
            return True
    return False
