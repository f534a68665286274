"""The op that stands for a mask while a model is captured."""

from __future__ import annotations

import torch


@torch.library.custom_op("fastgen::mask_marker", mutates_args=())
def mask_marker(padding_mask: torch.Tensor, kind: str, size: int) -> torch.Tensor:
    """Stands for a mask in a captured graph; resolved before the graph can run.

    Args:
        padding_mask: [1, num_tokens] bool. kind: "causal", "sliding", "chunked", or the name of a
            mask function that is not understood. size: Keys in a window, or tokens in a chunk.
    Raises: RuntimeError if it is ever run.
    """
    raise RuntimeError("a mask marker was left in a graph that runs")


@mask_marker.register_fake
def _(padding_mask, kind, size):
    num_tokens = padding_mask.shape[1]
    return padding_mask.new_empty((1, 1, num_tokens, num_tokens))
