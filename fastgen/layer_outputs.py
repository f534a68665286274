"""What the decoder layers return, read from a rewritten graph while it runs node by node.

Every node remembers the module it was traced in. What leaves a layer is the last of its values
that somebody outside reads. An add that became part of the norm behind it is that norm's second
output, which is there even where nobody reads it (behind the last layer).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from . import kernels
from .compiled import CompiledForward
from .config import SamplingParams
from .costs import op_name
from .engine.batch import build_batch
from .engine.block_pool import NULL_BLOCK
from .engine.kv_cache import KVCache
from .engine.request import Request
from .engine.scheduler import ScheduledRequest, SchedulerOutput
from .passes.graph import module_of

_ADD_NORM = "fastgen::add_rms_norm"
_LAYER = re.compile(r"(.+?\.\d+)(\.|$)")


@dataclass(frozen=True)
class _Output:
    """A node's value, or one of its several values."""

    node: fx.Node
    index: int | None = None


class LayerOutputs:
    """Where the outputs of the decoder layers are in a rewritten graph.

    names: The layers with attention whose outputs were found, as the model calls them, in order.
    """

    def __init__(self, compiled: CompiledForward, device: torch.device) -> None:
        self.compiled, self.device = compiled, device
        self._found = _outputs(compiled)
        self.names = list(self._found)

    @torch.inference_mode()
    def run(
        self, token_ids: list[int], num_prompt: int, block_size: int, chunk: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run a sequence alone over a cache of its own: the prompt in chunks, then token by token.

        Args:
            chunk: Most tokens of the prompt in one step.
        Returns: logits [tokens behind the prompt + 1, vocab_size] fp32, and by layer what it
            returned, [num_tokens, hidden_size].
        """
        compiled, device, total = self.compiled, self.device, len(token_ids)
        num_blocks = -(-total // block_size)
        cache = KVCache(compiled.spec, num_blocks + 1, block_size, device)
        request = Request(token_ids, SamplingParams(max_tokens=1))
        request.block_ids = list(range(NULL_BLOCK + 1, NULL_BLOCK + 1 + num_blocks))
        ends = [*range(chunk, num_prompt, chunk), *range(num_prompt, total + 1)]
        steps, logits = [], []
        for start, end in pairwise([0, *ends]):
            item = ScheduledRequest(request, start, end - start, samples=True)
            batch = build_batch(SchedulerOutput(items=[item]), block_size, device)
            graph = _Watching(compiled.lowered, list(self._found.values()))
            row = graph.run(*compiled.arguments(batch, cache))
            steps.append([value.reshape(end - start, -1) for value in graph.seen()])
            if end >= num_prompt:
                logits.append(row.float())
        values = [torch.cat(parts) for parts in zip(*steps, strict=True)]
        return torch.cat(logits), dict(zip(self.names, values, strict=True))


class _Watching(fx.Interpreter):
    """Runs a graph and keeps some of its values."""

    def __init__(self, module: fx.GraphModule, wanted: list[_Output]) -> None:
        super().__init__(module)
        self._wanted = wanted
        self._values: dict[fx.Node, Any] = dict.fromkeys(output.node for output in wanted)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._values:
            self._values[n] = result
        return result

    def seen(self) -> list[torch.Tensor]:
        """The wanted values of the last run."""
        return [
            self._values[node] if index is None else self._values[node][index]
            for node, index in ((output.node, output.index) for output in self._wanted)
        ]


def _outputs(compiled: CompiledForward) -> dict[str, _Output]:
    implementations = {
        choice.function: op
        for op in compiled.report.kernels
        for choice in kernels.implementations(op)
    }
    nodes = list(compiled.lowered.graph.nodes)
    layer_of = {node: _layer(node) for node in nodes}
    placeholders = [node for node in nodes if node.op == "placeholder"]
    specs = zip(placeholders, compiled.inputs.values(), strict=True)
    caches = {node for node, spec in specs if spec.kind == "cache"}
    attending = (layer_of[node] for node in nodes if caches & set(node.all_input_nodes))
    found: dict[str, _Output | None] = dict.fromkeys(name for name in attending if name)
    order = list(found)
    for node in nodes:
        name, value = layer_of[node], node.meta.get("val")
        if name in found and isinstance(value, torch.Tensor) and value.is_floating_point():
            if any(layer_of[user] != name for user in node.users):
                found[name] = _Output(node)
        elif node.op == "call_function" and op_name(node, implementations) == _ADD_NORM:
            added = {layer_of[operand] for operand in node.args[:2]} & set(order)  # pyright: ignore
            last = max(added, key=order.index, default=name)  # pyright: ignore
            if last != name and last is not None:
                found[last] = _Output(node, 1)
    return {name: output for name, output in found.items() if output is not None}


def _layer(node: fx.Node) -> str | None:
    """The decoder layer in which a node was traced: the outermost numbered module."""
    match = _LAYER.match(module_of(node) or "")
    return match[1] if match else None
