"""A call of generate() as transformers has prepared it: what a decoding loop starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..engine.engine import EngineCore
from ..optimized import TransformersLoop
from ..passes import Variant


@dataclass
class PreparedCall:
    """What transformers hands to its decoding loop, and the engine that computes the logits.

    model: as transformers calls it. input_ids: [B, T] int64, left-padded, repeated for
    num_return_sequences or num_beams. attention_mask and position_ids: of the prompt's shape, or
    None. past_key_values: the empty cache object that the result carries, or None. inputs_embeds:
    [B, T, hidden_size], the prompt in the place of input_ids, which are then what the result begins
    with, often nothing; or None.
    """

    model: Any
    engine: EngineCore
    input_ids: torch.Tensor
    logits_processor: Any
    stopping_criteria: Any
    generation_config: Any
    streamer: Any
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    past_key_values: Any
    inputs_embeds: torch.Tensor | None = None

    @property
    def prompt_shape(self) -> torch.Size:
        """[B, T] of the prompt."""
        given = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        return given.shape[:2]

    @property
    def returns_hidden_states(self) -> bool:
        config = self.generation_config
        return bool(config.return_dict_in_generate and config.output_hidden_states)

    @property
    def variant(self) -> Variant:
        """What the model's graph must take and give."""
        return Variant(self.inputs_embeds is not None, self.returns_hidden_states)

    @property
    def num_beams(self) -> int:
        return self.generation_config.num_beams or 1

    @property
    def max_new_tokens(self) -> int:
        """Tokens until every row must stop, by the length criterion transformers has made.

        Raises: TransformersLoop if there is none.
        """
        from transformers import MaxLengthCriteria

        lengths = [
            criterion.max_length
            for criterion in self.stopping_criteria
            if isinstance(criterion, MaxLengthCriteria)
        ]
        if not lengths:
            raise TransformersLoop("no length limit")
        return min(lengths) - self.input_ids.shape[1]

    @property
    def eos_token_ids(self) -> frozenset[int]:
        ids: set[int] = set()
        for criterion in self.stopping_criteria:
            if (eos := getattr(criterion, "eos_token_id", None)) is not None:
                ids.update(torch.as_tensor(eos).flatten().tolist())
        return frozenset(ids)
