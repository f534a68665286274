"""The rows of a prepared call become requests: a left-padded matrix, its mask and positions."""

from __future__ import annotations

import torch

from ..config import INT32_MAX, SamplingParams
from ..engine.request import Request
from .prepared import PreparedCall, TransformersLoop


def requests_of(call: PreparedCall) -> list[Request]:
    """A request per row: its visible tokens, and the row's last token if that is hidden.

    Raises: TransformersLoop for rows that the engine cannot run as they are.
    """
    max_new_tokens, input_ids = call.max_new_tokens, call.input_ids
    if not 0 < max_new_tokens <= INT32_MAX:
        raise TransformersLoop(f"{max_new_tokens} new tokens are asked for")
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise TransformersLoop("input_ids are not a matrix of integers")
    sampling = SamplingParams(max_tokens=max_new_tokens, temperature=0.0)
    stop_token_ids = call.eos_token_ids
    rows: list[list[int]] = input_ids.tolist()
    masks = [[1] * len(row) for row in rows]
    if call.attention_mask is not None:
        if call.attention_mask.shape != input_ids.shape:
            raise TransformersLoop("attention_mask and input_ids differ in shape")
        masks = call.attention_mask.tolist()
    positions = _positions(call.position_ids, input_ids)
    longest = input_ids.shape[1] + max_new_tokens
    windows = [layer.window for layer in call.engine.compiled.spec.layers if layer.window]
    windowed = min(windows, default=longest) < longest  # else a window never hides a slot
    requests = []
    for row, mask, places in zip(rows, masks, positions, strict=True):
        visible = [i for i, seen in enumerate(mask) if seen]
        if not visible:
            raise TransformersLoop("a row is masked completely")
        if [places[i] for i in visible] != list(range(len(visible))):
            raise TransformersLoop("positions do not count a row's tokens")
        if windowed and len(mask) - visible[0] > len(visible):
            raise TransformersLoop("a sliding window reaches over masked slots within a row")
        request = Request(
            [row[i] for i in visible],
            sampling,
            stop_token_ids,
            first_output_position=places[-1] + 1,
            stream=call.streamer is not None,
        )
        if not mask[-1]:
            request.query_token_id, request.query_position = row[-1], places[-1]
        requests.append(request)
    return requests


def _positions(position_ids: torch.Tensor | None, input_ids: torch.Tensor) -> list[list[int]]:
    if position_ids is None:
        raise TransformersLoop("transformers has prepared no position_ids")
    positions = position_ids.expand(len(input_ids), -1)
    if positions.shape != input_ids.shape:
        raise TransformersLoop("position_ids and input_ids differ in shape")
    return positions.tolist()
