"""The one form in which a model's graph travels: `CapturedGraph`.

The graph has placeholders only: every parameter, buffer, batch tensor and cache is an input, named
in `inputs`. It is written in ATen as torch.export leaves it before decomposition (`aten.linear` is
one node) plus the ops of `fastgen.kernels`. Its output is the logits, or a tuple that begins with
them: behind them come hidden states, where they were captured, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import fx

from ..kernels.packing import Layout

InputKind = Literal["parameter", "buffer", "constant", "merged", "packed", "batch", "cache"]

# Batch tensors a captured graph starts with; insert_paged_cache adds the rest of ForwardBatch.
BATCH_INPUTS = ("input_ids", "positions", "logits_indices")
# What follows them in a graph that takes embeddings, too.
EMBEDS_INPUTS = ("prompt_embeds", "is_embed")


@dataclass(frozen=True)
class Variant:
    """What a model's graph takes and gives besides tokens and logits; the plain one nothing.

    prompt_embeds: it takes `prompt_embeds` [num_tokens, hidden_size], and `is_embed` [num_tokens]
    bool, which says where they stand in the place of a token's own embedding. hidden_states: it
    gives what the model's forward gives as hidden_states, of every token, behind the logits.
    """

    prompt_embeds: bool = False
    hidden_states: bool = False

    def covers(self, other: Variant) -> bool:
        """Whether it takes and gives all that the other does."""
        return self | other == self

    @property
    def size(self) -> int:
        """How much it takes and gives."""
        return self.prompt_embeds + self.hidden_states

    def __or__(self, other: Variant) -> Variant:
        return Variant(
            self.prompt_embeds or other.prompt_embeds, self.hidden_states or other.hidden_states
        )

    def __str__(self) -> str:
        flags = {"prompt_embeds": self.prompt_embeds, "hidden_states": self.hidden_states}
        return " and ".join(name for name, is_set in flags.items() if is_set) or "plain"


PLAIN = Variant()


@dataclass(frozen=True)
class InputSpec:
    """What a placeholder is fed with.

    target: the parameter's or buffer's qualified name in the live model, the constant's key, the
    merge plan's name, what a packed weight is made from (a parameter or a merged weight), the batch
    field, or for a cache "key:<layer>" / "value:<layer>". layout: a packed weight's, see
    kernels/packing.py.
    """

    kind: InputKind
    target: str
    layout: Layout | None = None


@dataclass(frozen=True)
class MergePlan:
    """A weight that is the concatenation along dim 0 of parameters of the live model."""

    name: str
    members: tuple[str, ...]


@dataclass
class CapturedGraph:
    """A model's forward over packed tokens, and what its placeholders mean.

    inputs: placeholder name -> meaning, in the graph's order. constants: tensors the forward
    created while it was traced. parameter_refusals: parameter name -> why it must not be merged
    (tied, parametrised, storage shared), known only where the live model is at hand.
    pack_budget_bytes: what packed copies of weights may take. keeps_sequences_apart: whether that
    was seen when the graph was run; not with weights that say nothing. check_seconds: what it took.
    deterministic: whether a token's bits must not depend on what else is in the batch.
    """

    module: fx.GraphModule
    inputs: dict[str, InputSpec]
    num_layers: int
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    parameter_refusals: dict[str, str] = field(default_factory=dict)
    merges: list[MergePlan] = field(default_factory=list)
    pack_budget_bytes: int = 0
    keeps_sequences_apart: bool = False
    check_seconds: float = 0.0
    deterministic: bool = False

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def copy(self) -> Self:
        """A copy whose graph can be changed; weights and constants are shared."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, val_map=copies))
        for old, new in copies.items():
            new.meta = dict(old.meta)
        module = fx.GraphModule(self.module, graph)
        # torch.fx may rename a node on the way, for one if it is called like a builtin.
        inputs = {copies[node].name: self.inputs[node.name] for node in self.placeholders()}
        return replace(self, module=module, inputs=inputs, merges=list(self.merges))

    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def placeholder(self, kind: InputKind, target: str) -> fx.Node:
        """The placeholder with this meaning; KeyError if there is none."""
        for node in self.placeholders():
            if self.inputs[node.name] == InputSpec(kind, target):
                return node
        raise KeyError(f"the graph has no {kind} input {target!r}")

    def add_input(self, name: str, spec: InputSpec, value: torch.Tensor) -> fx.Node:
        """Append a placeholder after the existing ones; value is its fake tensor."""
        last = self.placeholders()[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.target = node.name  # the argument's name, which must be no other input's
        node.meta["val"] = value
        self.inputs[node.name] = spec
        return node

    def remove_unused_inputs(self) -> None:
        """Drop parameters, buffers and constants that no node reads any more."""
        for node in self.placeholders():
            if not node.users and self.inputs[node.name].kind in (
                "parameter",
                "buffer",
                "constant",
                "merged",
                "packed",
            ):
                del self.inputs[node.name]
                self.graph.erase_node(node)
        used = {spec.target for spec in self.inputs.values() if spec.kind in ("merged", "packed")}
        self.merges = [plan for plan in self.merges if plan.name in used]

    @property
    def variant(self) -> Variant:
        taken = {spec.target for spec in self.inputs.values() if spec.kind == "batch"}
        return Variant(EMBEDS_INPUTS[0] in taken, len(self.outputs()) > 1)

    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes of the logits and, behind them, of the hidden states."""
        output = next(node for node in self.graph.nodes if node.op == "output")
        nodes: Any = output.args[0]
        return nodes if isinstance(nodes, tuple) else (nodes,)

    def output_value(self) -> torch.Tensor:
        """The fake tensor of the logits."""
        return self.outputs()[0].meta["val"]

    def output_form(self) -> tuple[Any, Any]:
        """The dtypes and the shapes of all outputs, which no rewrite may change."""
        values = [node.meta["val"] for node in self.outputs()]
        return [value.dtype for value in values], [str(value.shape) for value in values]


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that an op writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    given.update(node.kwargs)
    written: list[fx.Node] = []
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            fx.map_arg(given.get(argument.name), written.append)
    return written


def module_of(node: fx.Node) -> str | None:
    """Name in the live model of the innermost module in which a node was traced, if it says so."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    name, _ = next(reversed(stack.values()))
    return name.removeprefix("model.")  # what the call that is traced names the model


def remember_module(node: fx.Node, name: str) -> None:
    """Say of a node what `module_of` answers."""
    node.meta["nn_module_stack"] = {name: (f"model.{name}", "")}


def memory_of(node: fx.Node) -> int | None:
    """A number for the storage of a node's value: views share it. None if it is no tensor."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def fake_mode_of(nodes: Sequence[fx.Node]):
    """The FakeTensorMode the graph was traced in."""
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    raise AssertionError("the graph carries no fake tensors")


def take_over_ops(graph: fx.Graph) -> None:
    """Ops that transformers has defined become ours: a graph must run where it is not imported."""
    ours = {"transformers.grouped_mm_fallback.default": torch.ops.fastgen.grouped_mm.default}
    for node in graph.nodes:
        node.target = ours.get(str(node.target), node.target)
