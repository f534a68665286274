"""Whether a variant of a model's graph computes what the plain graph does.

A graph that takes embeddings embeds the other tokens outside of the model, and one that gives
hidden states is rewritten around more outputs. Both must give the plain graph's logits for plain
tokens; a model that looks at token ids a second time (embeddings per layer) would not.
"""

from __future__ import annotations

import torch

from ..compiled import CompiledForward
from ..errors import UnsupportedModelError
from .batch import ForwardBatch
from .kv_cache import KVCache

# Two sequences, of tokens 1, 2, 3 and 4 to 8, each in a block of its own.
_LENGTHS = (3, 5)


@torch.inference_mode()
def check_variant(
    plain: CompiledForward, variant: CompiledForward, block_size: int, device: torch.device
) -> None:
    """Compare the logits of 8 tokens. Costs two forwards, and a cache of three blocks.

    Raises: UnsupportedModelError if they differ by more than rounding: sqrt(eps) of their dtype,
        relative to the largest.
    """
    expected = plain(_batch(plain, block_size, device), KVCache(plain.spec, 3, block_size, device))
    cache = KVCache(variant.spec, 3, block_size, device)
    logits = variant(_batch(variant, block_size, device), cache)
    largest, difference = expected.abs().max(), (expected - logits).abs().max()
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * largest
    if largest.isfinite() and not difference <= tolerance:
        raise UnsupportedModelError(
            f"with {variant.variant} the model computes other logits: they differ by "
            f"{float(difference):.2g}, rounding by less than {float(tolerance):.2g}"
        )


def _batch(forward: CompiledForward, block_size: int, device: torch.device) -> ForwardBatch:
    num_tokens = sum(_LENGTHS)
    positions = [position for length in _LENGTHS for position in range(length)]
    slots = [
        (1 + row) * block_size + position
        for row, length in enumerate(_LENGTHS)
        for position in range(length)
    ]
    int32 = {"dtype": torch.int32, "device": device}
    batch = ForwardBatch(
        input_ids=torch.arange(1, 1 + num_tokens, device=device) % forward.vocab_size,
        positions=torch.tensor(positions, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        query_start_loc=torch.tensor([0, _LENGTHS[0], num_tokens], **int32),
        seq_lens=torch.tensor(_LENGTHS, **int32),
        block_table=torch.tensor([[1], [2]], **int32),
        logits_indices=torch.arange(num_tokens, device=device),
    )
    if (like := forward.embeds_like) is not None:
        # Not a number is read nowhere: no token of these is an embedding.
        shape, nan = (num_tokens, like.shape[-1]), float("nan")
        batch.prompt_embeds = torch.full(shape, nan, dtype=like.dtype, device=device)
        batch.is_embed = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    return batch
