"""The loop of greedy search and sampling over rows that step together, in transformers' order.

Source: GenerationMixin._sample of transformers.
"""

from __future__ import annotations

from typing import Any

import torch

from ..engine.lockstep import LockstepGroup
from ..engine.request import Request
from .prepared import PreparedCall
from .returned_cache import fill_cache


def run_sample_loop(call: PreparedCall, requests: list[Request]) -> Any:
    """All rows step together, finished ones too: transformers' order of everything."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    config, input_ids = call.generation_config, call.input_ids
    as_dict = config.return_dict_in_generate
    scores: Any = () if as_dict and config.output_scores else None
    raw_logits: Any = () if as_dict and config.output_logits else None
    hidden_states: Any = () if call.returns_hidden_states else None
    pads_finished = any(hasattr(c, "eos_token_id") for c in call.stopping_criteria)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
    for request in requests:
        request.stop_token_ids = frozenset()
    with LockstepGroup(call.engine, requests) as group:
        while True:
            logits = group.next_logits().to(copy=True, dtype=torch.float32, device=input_ids.device)
            next_scores = call.logits_processor(input_ids, logits)
            if scores is not None:
                scores += (next_scores,)
            if raw_logits is not None:
                raw_logits += (logits,)
            if hidden_states is not None:
                hidden_states += (group.take_hidden_states(),)
            if config.do_sample:
                probabilities = torch.softmax(next_scores, dim=-1)
                tokens = torch.multinomial(probabilities, num_samples=1).squeeze(1)
            else:
                tokens = torch.argmax(next_scores, dim=-1)
            if pads_finished:
                pad = config._pad_token_tensor.to(input_ids.device)
                tokens = tokens * unfinished + pad * (1 - unfinished)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            unfinished = unfinished & ~call.stopping_criteria(input_ids, scores)
            token_ids = tokens.tolist()  # before the streamer may write into them
            if call.streamer is not None:
                call.streamer.put(tokens.cpu())
            if unfinished.max() == 0:
                break
            group.feed(token_ids)
        if as_dict:
            num_new = input_ids.shape[1] - call.input_ids.shape[1]
            fill_cache(call, requests, call.prompt_shape[1] + num_new - 1)
    if call.streamer is not None:
        call.streamer.end()
    if not as_dict:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,  # pyright: ignore
        scores=scores,
        logits=raw_logits,
        hidden_states=hidden_states,
        past_key_values=call.past_key_values,
    )
