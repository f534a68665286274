"""Beam search and beam sampling over rows that go on from one another's blocks.

Which beams go on and which have ended is transformers' own arithmetic: the steps that its mixin
gives every model are called through the model. What is here is the state between them, and that
the keys and values of a beam are never moved: a row takes over another row's block table.

Source: GenerationMixin._beam_search of transformers.
"""

from __future__ import annotations

from typing import Any

import torch

from ..engine.lockstep import LockstepGroup
from ..engine.request import Request
from .prepared import PreparedCall
from .returned_cache import fill_cache

# What a beam scores that must never be chosen.
_NEVER = -1e9


def run_beam_loop(call: PreparedCall, requests: list[Request]) -> Any:
    """Rows [prompts * num_beams] step together until no beam can get better, or all must stop."""
    from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

    config, device = call.generation_config, call.input_ids.device
    as_dict = config.return_dict_in_generate
    all_scores: Any = () if as_dict and config.output_scores else None
    raw_logits: Any = () if as_dict and config.output_logits else None
    beams = _Beams(call)
    running_ids = call.input_ids
    for request in requests:
        request.stop_token_ids = frozenset()
    with LockstepGroup(call.engine, requests, call.num_beams) as group:
        while True:
            logits = group.next_logits().to(copy=True, dtype=torch.float32, device=device)
            scores = call.logits_processor(running_ids, torch.log_softmax(logits, dim=-1))
            if raw_logits is not None:
                raw_logits += (logits,)
            if all_scores is not None:
                all_scores += (scores.clone(),)  # a processor may go on writing into its own
            beams.choose(scores, all_scores)
            if not beams.go_on():
                break
            running_ids = beams.running_ids()
            group.feed(running_ids[:, -1].tolist(), beams.parents())
        if as_dict:
            # The rows as transformers has reordered them for a step that does not come.
            fill_cache(call, group.computed(beams.parents()), beams.length - 1)
    sequences, sequences_scores, beam_indices = beams.best()
    if not as_dict:
        return sequences
    return GenerateBeamDecoderOnlyOutput(
        sequences=sequences,  # pyright: ignore
        sequences_scores=sequences_scores if config.output_scores else None,  # pyright: ignore
        scores=all_scores,
        logits=raw_logits,
        beam_indices=beam_indices,  # pyright: ignore
        past_key_values=call.past_key_values,
    )


class _Beams:
    """The beams of all prompts, those that run and the best of those that have ended.

    P prompts, N beams, sequences of up to L tokens whose first T are the prompt:

        running_sequences, sequences: [P, N, L] int64, filled up behind their end.
        running_scores, scores: [P, N] fp32, sums of log-probabilities; those of ended beams with
            the length penalty.
        running_indices, indices: [P, N, L - T] int32, the row that each token was chosen in, -1
            behind the end.
        ended: [P, N] bool, which of `sequences` are beams that have ended.
        improvable: [P, 1] bool, whether a running beam may still become one of the best.
        hits: [P, candidates] bool, which candidates of the last step met a stopping criterion.
        length: of the running sequences now.
    """

    def __init__(self, call: PreparedCall) -> None:
        config, input_ids = call.generation_config, call.input_ids
        self._model, self._config, self._criteria = call.model, config, call.stopping_criteria
        self._num_beams = num_beams = call.num_beams
        self._num_prompts = len(input_ids) // num_beams
        self.length = self._prompt_length = input_ids.shape[1]
        eos, pad = config._eos_token_tensor, config._pad_token_tensor
        # So many that enough go on even if some end with each of the end tokens.
        num_ends = 0 if eos is None else len(eos)
        self._num_candidates = max(2, 1 + num_ends) * num_beams
        filler = -1
        if eos is not None:  # a pad token 0 counts as none, as it does in transformers
            filler = int(pad) if pad is not None and int(pad) else int(eos[0])

        shape, device = (self._num_prompts, num_beams), input_ids.device
        new_tokens = config.max_length - self._prompt_length
        self.running_sequences = torch.full(
            (*shape, config.max_length), filler, dtype=torch.int64, device=device
        )
        self.running_sequences[..., : self.length] = input_ids.view(*shape, -1)
        self.sequences = self.running_sequences.clone()
        # All beams of a prompt are alike at first: only one of them counts.
        self.running_scores = torch.zeros(shape, device=device)
        self.running_scores[:, 1:] = _NEVER
        self.scores = torch.full(shape, _NEVER, device=device)
        self.running_indices = torch.full(
            (*shape, new_tokens), -1, dtype=torch.int32, device=device
        )
        self.indices = self.running_indices.clone()
        self.ended = torch.zeros(shape, dtype=torch.bool, device=device)
        self.improvable = torch.ones((len(self.ended), 1), dtype=torch.bool, device=device)
        self.hits = self.ended
        self._may_end = torch.arange(self._num_candidates, device=device) < num_beams

    def choose(self, next_scores: torch.Tensor, all_scores: Any) -> None:
        """Choose each beam's next token, and the beams that go on, from [P * N, vocab_size]."""
        model, config, num_beams = self._model, self._config, self._num_beams
        vocab_size = next_scores.shape[-1]
        summed = next_scores.reshape(self._num_prompts, num_beams, *next_scores.shape[1:])
        summed = (summed + self.running_scores[..., None]).flatten(1)
        candidate_scores, candidates, candidate_indices = model._get_top_k_continuations(
            accumulated_log_probs=summed,
            running_sequences=self.running_sequences,
            running_beam_indices=self.running_indices,
            cur_len=self.length,
            decoder_prompt_len=self._prompt_length,
            do_sample=config.do_sample,
            beams_to_keep=self._num_candidates,
            num_beams=num_beams,
            vocab_size=vocab_size,  # transformers 5.17 asks for it, 5.23 ignores it
            batch_size=self._num_prompts,
        )
        seen = candidates[..., : self.length + 1].flatten(0, 1)
        self.hits = self._criteria(seen, all_scores).view(self._num_prompts, -1)
        self.running_sequences, self.running_scores, self.running_indices = (
            model._get_running_beams_for_next_iteration(
                topk_log_probs=candidate_scores,
                topk_running_sequences=candidates,
                topk_running_beam_indices=candidate_indices,
                next_token_hits_stopping_criteria=self.hits,
                num_beams=num_beams,
            )
        )
        self.sequences, self.scores, self.indices, self.ended = model._update_finished_beams(
            sequences=self.sequences,
            topk_running_sequences=candidates,
            beam_scores=self.scores,
            topk_log_probs=candidate_scores,
            beam_indices=self.indices,
            topk_running_beam_indices=candidate_indices,
            is_early_stop_heuristic_unsatisfied=self.improvable,
            is_sent_finished=self.ended,
            next_token_hits_stopping_criteria=self.hits,
            top_num_beam_mask=self._may_end,
            num_beams=num_beams,
            cur_len=self.length,
            decoder_prompt_len=self._prompt_length,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
        )
        self.length += 1

    def go_on(self) -> bool:
        """Whether there is another step to do, after `choose`."""
        model, config = self._model, self._config
        self.improvable = model._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=self.improvable,
            running_beam_scores=self.running_scores,
            beam_scores=self.scores,
            is_sent_finished=self.ended,
            cur_len=self.length,
            max_length=config.max_length,
            decoder_prompt_len=self._prompt_length,
            early_stopping=config.early_stopping,
            length_penalty=config.length_penalty,
        )
        return bool(
            model._beam_search_has_unfinished_sequences(
                self.improvable, self.ended, self.hits, config.early_stopping
            )
        )

    def running_ids(self) -> torch.Tensor:
        """The running sequences: [P * N, length]."""
        return self.running_sequences[..., : self.length].flatten(0, 1)

    def parents(self) -> list[int]:
        """Of each running row the row that its last token was chosen in."""
        return self.running_indices[..., self.length - 1 - self._prompt_length].flatten().tolist()

    def best(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sequences that are asked for, their scores, and the rows they came from."""
        count = self._config.num_return_sequences
        indices = self.indices[:, :count].flatten(0, 1)
        num_new = int((indices >= 0).sum(dim=1).max())
        sequences = self.sequences[:, :count].flatten(0, 1)
        return (
            sequences[:, : self._prompt_length + num_new],
            self.scores[:, :count].flatten(),
            indices[:, :num_new],
        )
