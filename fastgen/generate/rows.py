"""The rows of a prepared call become requests: a left-padded prompt, its mask and positions."""

from __future__ import annotations

from typing import Any

import torch

from ..config import SamplingParams
from ..engine.request import Request
from ..limits import INT32_MAX
from .prepared import PreparedCall, TransformersLoop


def requests_of(call: PreparedCall) -> list[Request]:
    """A request per row: its visible tokens, and the row's last token if that is hidden.

    Raises: TransformersLoop for rows that the engine cannot run as they are.
    """
    max_new_tokens, input_ids = call.max_new_tokens, call.input_ids
    if not 0 < max_new_tokens <= INT32_MAX:
        raise TransformersLoop(f"{max_new_tokens} new tokens are asked for")
    if call.inputs_embeds is not None and call.inputs_embeds.dim() != 3:
        raise TransformersLoop("inputs_embeds are not [B, T, hidden_size]")
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise TransformersLoop("input_ids are not a matrix of integers")
    if not len(input_ids):
        raise TransformersLoop("there are no rows")
    if call.inputs_embeds is None and input_ids.numel():
        least, most = input_ids.aminmax()
        if least < 0 or most >= call.engine.compiled.vocab_size:
            raise TransformersLoop("input_ids hold ids that are not in the vocabulary")
    sampling = SamplingParams(max_tokens=max_new_tokens, temperature=0.0)
    stop_token_ids = call.eos_token_ids
    num_rows, num_prompt = call.prompt_shape
    rows: list[list[int]] = input_ids.tolist()
    embeds: list[Any] = [None] * num_rows
    if call.inputs_embeds is not None:
        embeds = list(_embeddings(call))
        rows = [[0] * num_prompt] * num_rows  # they only count
    masks = [[1] * num_prompt for _ in rows]
    if call.attention_mask is not None:
        if call.attention_mask.shape != call.prompt_shape:
            raise TransformersLoop("attention_mask and the prompt differ in shape")
        masks = call.attention_mask.tolist()
    positions = _positions(call)
    longest = num_prompt + max_new_tokens
    counts = any(layer.counts_places(longest) for layer in call.engine.compiled.spec.layers)
    requests = []
    for row, mask, places, embedded in zip(rows, masks, positions, embeds, strict=True):
        visible = [i for i, seen in enumerate(mask) if seen]
        if not visible:
            raise TransformersLoop("a row is masked completely")
        if len(visible) < num_prompt and call.returns_hidden_states:
            raise TransformersLoop(
                "the hidden states of masked slots are what transformers' attention makes of them"
            )
        if [places[i] for i in visible] != list(range(len(visible))):
            raise TransformersLoop("positions do not count a row's tokens")
        if counts and len(mask) - visible[0] > len(visible):
            raise TransformersLoop(
                "attention counts tokens (a sliding window, chunks, ALiBi), and some within a row "
                "are masked"
            )
        request = Request(
            [row[i] for i in visible],
            sampling,
            stop_token_ids,
            first_output_position=places[-1] + 1,
            prompt_embeds=None if embedded is None else embedded[visible],
            wants_hidden_states=call.returns_hidden_states,
            fails_on_nan=False,
        )
        if not mask[-1] and embedded is not None:
            raise TransformersLoop("a row of inputs_embeds ends with a masked slot")
        if not mask[-1]:
            request.query_token_id, request.query_position = row[-1], places[-1]
        requests.append(request)
    return requests


def _positions(call: PreparedCall) -> list[list[int]]:
    if call.position_ids is None:
        raise TransformersLoop("transformers has prepared no position_ids")
    positions = call.position_ids.expand(call.prompt_shape[0], -1)
    if positions.shape != call.prompt_shape:
        raise TransformersLoop("position_ids and the prompt differ in shape")
    return positions.tolist()


def _embeddings(call: PreparedCall) -> torch.Tensor:
    """[B, T, hidden_size] on the model's device, as the graph takes them."""
    embeds, forward = call.inputs_embeds, call.engine.forward_with(call.variant)
    assert embeds is not None
    like = None if forward is None else forward.embeds_like
    if like is None:
        raise TransformersLoop("the model was changed meanwhile")
    if embeds.shape[2:] != like.shape[1:] or embeds.dtype != like.dtype:
        raise TransformersLoop(
            f"inputs_embeds are {tuple(embeds.shape)} of {embeds.dtype}, embeddings of the model "
            f"have {like.shape[1]} numbers of {like.dtype}"
        )
    return embeds.detach().to(call.engine.device)


def columns(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Positions for a model that takes none and numbers its tokens: those of each row alone.

    In its own left-padded batches transformers counts the padding with them.
    Raises: TransformersLoop if a last slot is masked: what it would be asked for is not known.
    """
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    if attention_mask is None or attention_mask.shape != input_ids.shape:
        return places
    if not attention_mask[:, -1].all():
        raise TransformersLoop("the model takes no position_ids, and a last slot is masked")
    return places - attention_mask.ne(0).int().argmax(dim=1, keepdim=True)
