"""Greedy rows that nothing looks at together run at their own pace."""

from __future__ import annotations

import torch

from ..engine.engine import failure
from ..engine.request import Request
from ..engine.token_reader import TokenReader
from .prepared import PreparedCall


def may_run_free(call: PreparedCall) -> bool:
    """Whether rows may run at their own pace: greedy, and nothing looks at all rows at once."""
    from transformers import EosTokenCriteria, MaxLengthCriteria

    config = call.generation_config
    return (
        not config.do_sample
        and call.num_beams == 1
        and not config.return_dict_in_generate
        and len(call.logits_processor) == 0
        and all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in call.stopping_criteria)
        and (call.streamer is None or len(call.input_ids) == 1)
    )


def run_free(call: PreparedCall, requests: list[Request]) -> torch.Tensor:
    """Each row ends on its own; short ones are padded, as transformers' loop would have."""
    try:
        call.engine.submit_all(requests)
        for request in requests:
            if call.streamer is not None:
                for _, token_id in TokenReader([request]):
                    if token_id is not None:
                        call.streamer.put(torch.tensor([token_id]))
            request.done.wait()
            if request.finish_reason in ("error", "cancelled"):
                raise failure(request)
    finally:
        call.engine.cancel_all(requests)
    if call.streamer is not None:
        call.streamer.end()
    longest = max(len(request.output_token_ids) for request in requests)
    pad = call.generation_config._pad_token_tensor
    pad_id = 0 if pad is None else int(pad)  # without end tokens all rows are of one length
    padded = [
        request.output_token_ids + [pad_id] * (longest - len(request.output_token_ids))
        for request in requests
    ]
    new_tokens = torch.tensor(padded, dtype=torch.long, device=call.input_ids.device)
    return torch.cat([call.input_ids, new_tokens], dim=-1)
