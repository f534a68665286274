"""The call of a model that is traced: packed tokens in, logits of the selected rows out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..passes import PLAIN, Variant
from .supported import selects_rows, takes_positions


class PackedForward(nn.Module):
    """A model as it is traced.

    With prompt_embeds generated tokens are embedded here, as the model embeds them itself; whether
    that is all it does with them, the caller sees when he runs the graph. Hidden states come
    behind the logits.
    """

    def __init__(self, model: Any, variant: Variant = PLAIN) -> None:
        super().__init__()
        self.model, self.variant = model, variant
        self.takes_positions, self.selects_rows = takes_positions(model), selects_rows(model)
        rows: list[torch.Tensor] = []
        self.select = rows.append  # a tensor among its attributes export would warn of
        if not self.selects_rows:  # its head then gets no more than the rows
            head: Any = model.get_output_embeddings()
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, rows.pop()],))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logits_indices: torch.Tensor,
        prompt_embeds: torch.Tensor | None = None,
        is_embed: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        torch._check(input_ids.shape[0] == positions.shape[0])
        input_ids, arguments = input_ids.unsqueeze(0), {}
        if prompt_embeds is None or is_embed is None:
            arguments["input_ids"] = input_ids
        else:
            embedded = self.model.get_input_embeddings()(input_ids)  # pyright: ignore
            if embedded.dtype != prompt_embeds.dtype:
                raise UnsupportedModelError(
                    f"token embeddings are {embedded.dtype}, their weight is {prompt_embeds.dtype}"
                )
            chosen = torch.where(is_embed[None, :, None], prompt_embeds, embedded)
            arguments["inputs_embeds"] = chosen
        if self.takes_positions:
            arguments["position_ids"] = positions.unsqueeze(0)
        if self.selects_rows:
            arguments["logits_to_keep"] = logits_indices
        else:
            self.select(logits_indices)
        if self.variant.hidden_states:
            arguments["output_hidden_states"] = True
        # A padding mask keeps transformers from guessing packed sequences out of the positions.
        output = self.model(attention_mask=torch.ones_like(input_ids), use_cache=False, **arguments)
        logits = output.logits.squeeze(0)
        if not self.variant.hidden_states:
            return logits
        return logits, *_flat_states(output.hidden_states, input_ids.shape[1])


def _flat_states(hidden_states: Any, num_tokens: int) -> list[torch.Tensor]:
    """[num_tokens, hidden_size] of each of the hidden states that the forward gave."""
    if not isinstance(hidden_states, tuple) or not hidden_states:
        raise UnsupportedModelError("the forward gives no hidden states")
    for state in hidden_states:
        if not isinstance(state, torch.Tensor) or state.shape[:2] != (1, num_tokens):
            what = tuple(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
            raise UnsupportedModelError(
                f"a hidden state of the forward is {what}, not [1, num_tokens, hidden_size]"
            )
    return [state.squeeze(0) for state in hidden_states]
