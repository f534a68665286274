"""A kernel that fails while a model runs: it is found, and its reference takes its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from . import kernels


class _Finder(fx.Interpreter):
    """Runs a graph node by node and knows where it is."""

    current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        return super().run_node(n)


def find_failing_kernel(
    lowered: fx.GraphModule, arguments: Sequence[Any]
) -> kernels.Implementation | None:
    """Run a step again, node by node, as far as a kernel that has a reference fails.

    Steps may be repeated: what they write into the cache is the same each time.

    Returns: None if all of it runs, or something else fails; or the kernel says by a ValueError
        that its arguments do not fit, which is no fault of its own.
    """
    finder = _Finder(lowered)
    try:
        finder.run(*arguments)
    except ValueError:
        return None
    except Exception:
        assert finder.current is not None
        failing = finder.current.meta.get("kernel")
        return None if failing is None or failing == _reference(failing) else failing
    return None


def use_reference(graph: fx.Graph, failing: kernels.Implementation) -> int:
    """Run the reference wherever the graph runs this kernel; how many calls that are."""
    reference, count = _reference(failing), 0
    for node in graph.nodes:
        if node.meta.get("kernel") == failing:
            node.target, node.meta["kernel"] = reference.function, reference
            count += 1
    return count


def _reference(implementation: kernels.Implementation) -> kernels.Implementation:
    return kernels.implementations(implementation.op)[-1]
