"""What the values of a graph are like, for a graph that is run and never traced.

torch's own fake tensors and symbolic sizes bring its compiler along, whose import takes longer than
all else that a start from a file does. Choosing kernels and recording programs ask for shapes,
strides, dtypes and devices only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx.experimental.sym_node import SymNode


class _Sizes:
    """What a symbolic size asks about; a question that has no answer for all sizes is answered for
    those of the example, as torch's own does."""

    _translation_validation_enabled = False
    _replacements_version_counter = 0
    prefer_deferred_runtime_asserts_over_guards = False

    def __init__(self) -> None:
        self.examples: dict[Any, Any] = {}

    def evaluate_sym_node(
        self, node: SymNode, size_oblivious: bool = False, fallback_value: bool | None = None
    ) -> Any:
        value: Any = node.expr.xreplace(self.examples)
        return int(value) if value.is_number else bool(value)

    def replace(self, expression: Any) -> Any:
        return expression

    def _create_fx_call_function(self, *_: Any) -> tuple[None, bool]:
        return None, False


class ValueForm(torch.Tensor):
    """A tensor without memory, on any device; nothing can be computed with it."""

    @staticmethod
    def __new__(
        cls, shape: Sequence[Any], strides: Sequence[Any], dtype: torch.dtype, device: torch.device
    ) -> ValueForm:
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, shape, strides=strides, dtype=dtype, device=device
        )

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{function} of a tensor that stands for a value")

    def __repr__(self) -> str:  # pyright: ignore
        return f"ValueForm({tuple(self.shape)}, {self.dtype}, {self.device})"


class ValueForms:
    """Makes sizes and tensors for one graph. Sizes of the same example are the same size."""

    def __init__(self) -> None:
        self._sizes = _Sizes()
        self._known: dict[int, torch.SymInt] = {}

    def size(self, example: int) -> torch.SymInt:
        if example not in self._known:
            symbol = sympy.Symbol(f"s{len(self._known)}", integer=True, positive=True)
            self._sizes.examples[symbol] = sympy.Integer(example)
            self._known[example] = torch.SymInt(
                SymNode(symbol, self._sizes, int, example)  # pyright: ignore
            )
        return self._known[example]

    def tensor(
        self, shape: Sequence[Any], strides: Sequence[Any], dtype: torch.dtype, device: str
    ) -> torch.Tensor:
        return ValueForm(shape, strides, dtype, torch.device(device))
