"""The rewritten graph compiled by torch's Inductor, once for all lengths.

Every kernel that was chosen stays one opaque call; Inductor writes code for what lies between.
Sizes are unbacked symbols: no branch can be taken on them, so nothing that was compiled depends on
the lengths it was compiled with, and there are no guards to check or to miss. Weights and caches
are inputs of the compiled code as of the graph, so nothing of them is baked in, and a kernel is
handed the cache itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .errors import UnsupportedModelError
from .kernels import Implementation
from .passes import CapturedGraph

# Said here lest a user's settings say otherwise. freezing would bake weights in, CUDA graphs of
# Inductor's would copy the inputs, and size_asserts are what finds a weight that lies differently.
OPTIONS = {"freezing": False, "triton.cudagraphs": False, "size_asserts": True}


@torch.inference_mode(False)  # what is compiled in it fails outside
@torch.no_grad()
def compile_with_inductor(lowered: CapturedGraph) -> Callable[..., torch.Tensor]:
    """Compile a graph whose kernels were chosen; it takes what the graph takes.

    Raises: UnsupportedModelError if the graph cannot be compiled, or not on this machine.
    """
    module, examples = opaque_module(lowered)
    try:
        import torch._inductor as inductor  # 1 s, for those who use it

        return inductor.compile(module, examples, options=dict(OPTIONS))  # pyright: ignore
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise UnsupportedModelError(
            f"torch's Inductor cannot compile the graph ({type(error).__name__}: "
            f'{lines[0] if lines else ""}); use codegen="direct"'
        ) from error


def opaque_module(lowered: CapturedGraph) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The graph with each chosen kernel as one op, and a fake tensor for each input.

    Raises: UnsupportedModelError for weights whose memory torch does not know.
    """
    layouts = {spec.layout for spec in lowered.inputs.values()}
    if "onednn" in layouts:
        raise UnsupportedModelError(
            "torch's Inductor needs weights that are plain memory, and some are packed in "
            'oneDNN\'s layout here; use codegen="direct" or pack=False'
        )
    examples = _examples(lowered)
    running = lowered.copy()
    for node in running.graph.nodes:
        kernel = node.meta.get("kernel")
        if kernel is not None and node.target is kernel.function:
            node.target = opaque(kernel)
        node.meta = {}  # of another trace, with other symbols
    running.module.recompile()
    return running.module, examples


def _examples(graph: CapturedGraph) -> list[torch.Tensor]:
    """A fake tensor per input; sizes that are one in the graph are one symbol here.

    All caches share their two sizes, which the graph counts for each of them.
    """
    environment = ShapeEnv()
    symbols: dict[Any, torch.SymInt] = {}

    def size_of(size: Any, name: Any) -> Any:
        if isinstance(size, int):
            return size
        if name not in symbols:
            with environment.ignore_fresh_unbacked_symbols():  # they are inputs, not results
                symbols[name] = environment.create_unbacked_symint()
            torch._check(symbols[name] >= 0)
        return symbols[name]

    examples = []
    with FakeTensorMode(shape_env=environment):
        for node in graph.placeholders():
            spec, value = graph.inputs[node.name], node.meta["val"]
            shape = [
                size_of(size, ("cache", dim) if spec.kind == "cache" else str(size))
                for dim, size in enumerate(value.shape)
            ]
            if all(isinstance(size, int) for size in shape):
                example = torch.empty_strided(
                    shape, value.stride(), dtype=value.dtype, device=value.device
                )
            else:  # a batch's tensors and the caches are contiguous
                example = torch.empty(shape, dtype=value.dtype, device=value.device)
            examples.append(example)
    return examples


@functools.cache
def opaque(kernel: Implementation) -> Callable[..., Any]:
    """The kernel as an op, `fastgen_<implementation>::<op>`, with its op's schema and fake."""
    name = kernel.op.split("::")[1]
    op = getattr(torch.ops.fastgen, name).default
    namespace = f"fastgen_{kernel.name}"
    library = library_of_ops(namespace)
    library.define(
        str(op._schema).split("::")[1],
        tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
    )
    library.impl(name, kernel.function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::{name}", lambda *args: op(*args), lib=library)
    return getattr(getattr(torch.ops, namespace), name).default


@functools.cache
def library_of_ops(namespace: str) -> torch.library.Library:
    """Kept for good: its ops go with it."""
    return torch.library.Library(namespace, "FRAGMENT")
