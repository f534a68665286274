"""Whether a captured graph keeps the sequences of a call apart.

Tokens of many sequences share a call, and only attention may look from one token to another. A
model that shifts or sums over its tokens elsewhere, or numbers them by their place in the call
instead of their position, would be captured without a complaint and compute something else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from .errors import UnsupportedModelError
from .passes import CapturedGraph

# Tokens of two sequences, their positions, and another order of them.
_SEQUENCES = ((0, 1, 2), (3, 4, 5, 6, 7))
_POSITIONS = (0, 1, 2, 0, 1, 2, 3, 4)
_MIXED = (3, 0, 4, 5, 1, 6, 2, 7)


class _Forward(fx.Interpreter):
    """Runs a captured graph over tokens in any order, attention within each sequence alone."""

    def __init__(self, module: fx.GraphModule, order: torch.Tensor) -> None:
        super().__init__(module)
        self.order, self.place = order, order.argsort()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not torch.ops.fastgen.attention.default:
            return super().call_function(target, args, kwargs)
        query, key, value, *rest = args
        outputs = []
        for rows in _SEQUENCES:
            here = self.place[list(rows)]
            outputs.append(target(query[here], key[here], value[here], *rest))
        return torch.cat(outputs)[self.order]


def check_packing(model: nn.Module, captured: CapturedGraph) -> bool:
    """Compare the logits of a short sequence between two calls that it shares with another one.

    The other's tokens differ, and the order in which all tokens lie. Masks must be resolved. Costs
    two forwards of 8 tokens.
    Returns: whether the logits say something: not if they are all zero, or not finite.
    Raises: UnsupportedModelError if the logits differ by more than rounding: sqrt(eps) of their
        dtype, relative to the largest.
    """
    device = next(model.parameters()).device
    own, other = range(len(_SEQUENCES[0])), len(_SEQUENCES[1])
    in_turn = torch.arange(len(_MIXED), device=device)
    mixed = torch.tensor(_MIXED, device=device)
    first = _logits(model, captured, in_turn, [*own, *range(3, 3 + other)])
    second = _logits(model, captured, mixed, [*own, *range(3 + other, 3 + 2 * other)])
    largest, difference = first.abs().max(), (first - second).abs().max()
    tolerance = torch.finfo(first.dtype).eps ** 0.5 * largest
    if largest.isfinite() and not difference <= tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not keep sequences apart that share a call: one changes "
            f"another's logits by {float(difference):.2g}, rounding by less than "
            f"{float(tolerance):.2g}; something besides attention looks at other tokens, or "
            "positions are not taken from position_ids"
        )
    return bool(largest.isfinite() and largest > 0)


def _logits(
    model: nn.Module, captured: CapturedGraph, order: torch.Tensor, token_ids: list[int]
) -> torch.Tensor:
    """[3, vocab_size] of the first sequence in a call with its tokens in `order`."""
    vocab_size = int(captured.output_value().shape[-1])
    input_ids = torch.tensor(token_ids, device=order.device)[order] % vocab_size
    batch = {
        "input_ids": input_ids,
        "positions": torch.tensor(_POSITIONS, device=order.device)[order],
        "logits_indices": order.argsort()[: len(_SEQUENCES[0])],
    }
    if captured.variant.prompt_embeds:  # some number for each token, in the place of every other
        example = captured.placeholder("batch", "prompt_embeds").meta["val"]
        places = torch.arange(example.shape[-1], device=order.device)
        batch["prompt_embeds"] = torch.sin(input_ids[:, None] + places).to(example.dtype)
        batch["is_embed"] = input_ids % 2 == 0
    values = []
    for spec in captured.inputs.values():
        match spec.kind:
            case "batch":
                values.append(batch[spec.target])
            case "constant":
                values.append(captured.constants[spec.target])
            case "buffer":
                values.append(model.get_buffer(spec.target))
            case _:
                values.append(model.get_parameter(spec.target))
    result = _Forward(captured.module, order).run(*values)
    return result[0] if isinstance(result, tuple) else result
