"""One step as the scheduler decides it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Request
from .running_rows import Decodes, RunningRows

NO_DECODES = RunningRows().decodes([])


@dataclass(frozen=True)
class ScheduledRequest:
    """Tokens [start, start + num_tokens) of a request run in this step.

    samples: the last of them gives the logits of the next token. query: (token id, position) of a
    token that is asked and not stored, in place of the tokens: the request's own query token, or
    its last token, whose keys and values were in the cache already. all_logits: the logits of all
    tokens are wanted, for the prompt's logprobs.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    query: tuple[int, int] | None = None
    all_logits: bool = False

    @property
    def num_logits(self) -> int:
        """Rows of logits that this item gives."""
        return self.num_tokens if self.all_logits else int(self.samples)


@dataclass
class SchedulerOutput:
    """One step: what runs, and the blocks whose content was given up since the last one.

    block_copies: (source, target) of blocks to copy before the step: all sources are read first,
    then freed blocks may lose their content, a target never. decodes: The first of the running
    requests, if they run their last token; nearly all of most steps. items: Of those that follow.
    """

    items: list[ScheduledRequest] = field(default_factory=list)
    freed_blocks: list[int] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    decodes: Decodes = NO_DECODES

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(item.num_tokens for item in self.items)

    @property
    def num_seqs(self) -> int:
        return len(self.decodes) + len(self.items)

    @property
    def scheduled(self) -> list[ScheduledRequest]:
        """All of the step in one form, for those who have time."""
        decodes = zip(self.decodes.requests, self.decodes.seq_lens.tolist(), strict=True)
        return [ScheduledRequest(r, length - 1, 1, samples=True) for r, length in decodes] + [
            *self.items
        ]
