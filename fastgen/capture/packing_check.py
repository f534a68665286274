"""Whether a captured graph keeps the sequences of a call apart.

Tokens of many sequences share a call, and only attention may look from one token to another. A
model that shifts or sums over its tokens elsewhere, or numbers them by their place in the call
instead of their position, would be captured without a complaint and compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

from ..errors import UnsupportedModelError
from ..passes import CapturedGraph, InputSpec

# Tokens of two sequences, and another order of them.
_SEQUENCES = ((0, 1, 2), (3, 4, 5, 6, 7))
_MIXED = (3, 0, 4, 5, 1, 6, 2, 7)


class _Forward(fx.Interpreter):
    """Runs a captured graph over tokens in any order, attention within each sequence alone."""

    def __init__(
        self, module: fx.GraphModule, order: torch.Tensor, sequences: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(module)
        self.order, self.place, self.sequences = order, order.argsort(), sequences

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not torch.ops.fastgen.attention.default:
            return super().call_function(target, args, kwargs)
        query, key, value, *rest = args
        outputs = []
        for rows in self.sequences:
            here = self.place[list(rows)]
            outputs.append(target(query[here], key[here], value[here], *rest, **kwargs))
        return torch.cat(outputs)[self.order]


def check_packing(model: nn.Module, captured: CapturedGraph) -> bool:
    """Compare the logits of a short sequence between two calls that it shares with another one.

    The other's tokens differ, and the order in which all tokens lie. Masks must be resolved. Costs
    two forwards of 8 tokens.
    Returns: whether the logits say something: not if they are all zero, or not finite.
    Raises: UnsupportedModelError if the logits differ by more than rounding: sqrt(eps) of their
        dtype, of fp32 at least, relative to the largest.
    """
    device = next(model.parameters()).device
    own, other = range(len(_SEQUENCES[0])), len(_SEQUENCES[1])
    in_turn = torch.arange(len(_MIXED), device=device)
    mixed = torch.tensor(_MIXED, device=device)
    first = _logits(model, captured, in_turn, [*own, *range(3, 3 + other)], _SEQUENCES)
    second = _logits(model, captured, mixed, [*own, *range(3 + other, 3 + 2 * other)], _SEQUENCES)
    first, second = first[: len(own)], second[: len(own)]
    difference, tolerance = _compare(first, second)
    if first.isfinite().all() and not difference <= tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not keep sequences apart that share a call: one changes "
            f"another's logits by {difference:.2g}, rounding by less than {tolerance:.2g}; "
            "something besides attention looks at other tokens, or positions are not taken from "
            "position_ids"
        )
    return bool(first.isfinite().all() and first.abs().max() > 0)


def check_logits(
    model: nn.Module,
    captured: CapturedGraph,
    plain_forward: Callable[[torch.Tensor], torch.Tensor],
    num_tokens: int,
) -> None:
    """Compare the graph's logits with those of the model itself, for one sequence in a shared call.

    plain_forward: token ids [num_tokens] -> logits [num_tokens, vocab_size]. Costs one forward of
    the model and one of the graph, over two sequences of so many tokens.
    Raises: UnsupportedModelError if they differ by more than `check_packing` allows, or the model
        itself does not run.
    """
    device = next(model.parameters()).device
    sequences = (range(num_tokens), range(num_tokens, 2 * num_tokens))
    generator = torch.Generator().manual_seed(0)
    vocab_size = int(captured.output_value().shape[-1])
    token_ids = torch.randint(vocab_size, (2 * num_tokens,), generator=generator).tolist()
    order = torch.arange(2 * num_tokens, device=device)
    found = _logits(model, captured, order, token_ids, sequences)[num_tokens:]
    try:
        expected = plain_forward(torch.tensor(token_ids[num_tokens:], device=device))
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be compared with the captured graph, for it does not "
            f"run itself: {type(error).__name__}: {error}"
        ) from error
    difference, tolerance = _compare(expected, found)
    if expected.isfinite().all() and not difference <= tolerance:
        raise UnsupportedModelError(
            f"the captured graph computes other logits than {type(model).__name__} itself: they "
            f"differ by {difference:.2g} after {num_tokens} tokens, rounding by less than "
            f"{tolerance:.2g}"
        )


def check_width(model: nn.Module, captured: CapturedGraph, num_tokens: int) -> None:
    """See that the graph takes calls of so many tokens: shapes alone are computed.

    Raises: UnsupportedModelError if some shape does not fit: a table of the model is too short.
    """
    device = next(model.parameters()).device
    rows = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    with FakeTensorMode() as mode:
        values = [
            mode.from_tensor(rows, static_shapes=True)
            if spec.kind == "batch"
            else mode.from_tensor(tensor_of(model, captured, spec), static_shapes=True)
            for spec in captured.inputs.values()
        ]
        try:
            fx.Interpreter(captured.module).run(*values)
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} takes no more tokens in a call than its tables have: "
                f"{str(error).splitlines()[0]}"
            ) from None


def _compare(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """The largest difference, and what rounding may make of it.

    Models in fp64 round to fp32 too: in their norms and RoPE.
    """
    difference = (first.float() - second.float()).abs().max()
    eps = max(torch.finfo(dtype).eps for dtype in (first.dtype, torch.float32))
    return float(difference), float(eps**0.5 * first.abs().max())


def _logits(
    model: nn.Module,
    captured: CapturedGraph,
    order: torch.Tensor,
    token_ids: Sequence[int],
    sequences: Sequence[Sequence[int]],
) -> torch.Tensor:
    """[num_tokens, vocab_size], sequence after sequence, of tokens that lie in `order`."""
    vocab_size = int(captured.output_value().shape[-1])
    positions = [place for rows in sequences for place in range(len(rows))]
    input_ids = torch.tensor(token_ids, device=order.device)[order] % vocab_size
    batch = {
        "input_ids": input_ids,
        "positions": torch.tensor(positions, device=order.device)[order],
        "logits_indices": order.argsort(),
    }
    if captured.variant.prompt_embeds:  # some number for each token, in the place of every other
        example = captured.placeholder("batch", "prompt_embeds").meta["val"]
        places = torch.arange(example.shape[-1], device=order.device)
        batch["prompt_embeds"] = torch.sin(input_ids[:, None] + places).to(example.dtype)
        batch["is_embed"] = input_ids % 2 == 0
    values = [
        batch[spec.target] if spec.kind == "batch" else tensor_of(model, captured, spec)
        for spec in captured.inputs.values()
    ]
    result = _Forward(captured.module, order, sequences).run(*values)
    return result[0] if isinstance(result, tuple) else result


def tensor_of(model: nn.Module, captured: CapturedGraph, spec: InputSpec) -> torch.Tensor:
    """What a parameter, buffer or constant of a captured graph is in the model."""
    match spec.kind:
        case "constant":
            return captured.constants[spec.target]
        case "buffer":
            return model.get_buffer(spec.target)
        case _:
            return model.get_parameter(spec.target)
