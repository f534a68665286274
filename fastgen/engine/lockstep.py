"""Rows that step together, their tokens chosen by the caller instead of the engine's sampler."""

from __future__ import annotations

import queue
from collections.abc import Sequence

import torch

from .engine import EngineCore
from .request import Request
from .threads import release_openmp_team


class LockstepGroup:
    """A batch of B requests whose t-th tokens are chosen in one go from logits [B, vocab_size].

    num_beams: So many rows, one behind the other, have the same prompt; it is computed once, and
    the first `feed` must name the parents.

    The caller alternates `next_logits` and `feed` from its own thread and leaves the `with` block
    to end all rows. The engine may compute the rows in different steps, in chunks or again after a
    preemption: a row that is ready waits for the others.
    """

    def __init__(self, engine: EngineCore, requests: list[Request], num_beams: int = 1) -> None:
        assert len(requests) % num_beams == 0, "the prompts have different numbers of beams"
        self._engine = engine
        self.requests = requests
        # Of each row the one that is computed for it, until the first feed.
        self._leaders = [row - row % num_beams for row in range(len(requests))]
        self._rows: dict[int, torch.Tensor] = {}
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._num_given = 0  # logits given to the caller so far
        self._turn: object = None  # of the caller, as the watchdog knows it
        self._hidden = [_HiddenStates() for _ in requests]
        for row, request in enumerate(requests):
            request.group, request.row = self, row
            request.needs_fork = self._leaders[row] != row

    def __enter__(self) -> LockstepGroup:
        try:
            self._engine.submit_all(self.requests, together=True)
        except KeyboardInterrupt:
            self._engine.cancel_all(self.requests)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._caller_answers()
        self._engine.cancel_all(self.requests)

    def next_logits(self) -> torch.Tensor:
        """Wait for the logits of all rows: [B, vocab_size], the model's dtype, the caller's own.

        Raises: whatever ended a row.
        """
        self._caller_answers()
        release_openmp_team()
        result = self._ready.get()
        if isinstance(result, BaseException):
            raise result
        what = f"the caller that chooses the next tokens of {len(self.requests)} rows"
        self._turn = self._engine.watchdog.begin(what)
        return result

    def _caller_answers(self) -> None:
        """It is no longer the caller's turn."""
        turn, self._turn = self._turn, None
        if turn is not None:
            self._engine.watchdog.end(turn)

    def feed(self, token_ids: list[int], parents: list[int] | None = None) -> None:
        """The next token of every row.

        Raises: IndexError for a token that the model has not; it would end other requests, too.

        parents: Row i goes on from what row parents[i] was, then gets token_ids[i]; None: every
        row goes on from itself.
        """
        vocab_size = self._engine.compiled.vocab_size
        if not all(0 <= token_id < vocab_size for token_id in token_ids):
            raise IndexError(f"next tokens must be between 0 and {vocab_size - 1}, got {token_ids}")
        if parents is not None:
            parents = [self._leaders[parent] for parent in parents]
        assert parents is not None or not any(r.needs_fork for r in self.requests), (
            "the beams of a prompt have no parents"
        )
        self._leaders = list(range(len(self.requests)))
        self._caller_answers()
        self._engine.feed(self.requests, token_ids, parents)

    def computed(self, rows: list[int]) -> list[Request]:
        """The requests that hold what these rows have computed."""
        return [self.requests[self._leaders[row]] for row in rows]

    def take_hidden_states(self) -> tuple[torch.Tensor, ...]:
        """After `next_logits`: the hidden states of the tokens that these logits follow.

        Returns: [B, num_tokens, hidden_size] of each that the model's forward gives, the prompt's
            tokens the first time, then one; the rows must have as many. The caller's own.
        """
        rows = [hidden.take() for hidden in self._hidden]
        return tuple(torch.stack(layer) for layer in zip(*rows, strict=True))

    def offer(self, request: Request, logits: torch.Tensor) -> None:
        """Called by the engine: one row's logits [vocab_size]."""
        if len(request.output_token_ids) < self._num_given:
            return  # it was preempted after it had offered these, and computed again
        self._rows[request.row] = logits
        if len(self._rows) == len(set(self._leaders)):
            rows = [self._rows[row] for row in self._leaders]
            self._rows.clear()
            self._num_given += 1
            self._ready.put(torch.stack(rows))

    def note_hidden_states(
        self,
        request: Request,
        start: int,
        states: Sequence[torch.Tensor],
        place: int,
        num_tokens: int,
    ) -> None:
        """Called by the engine: a row's tokens in [place, place + num_tokens) of a step."""
        self._hidden[request.row].add(start, states, place, num_tokens)

    def fail(self, error: BaseException) -> None:
        """Called by the engine: a row has ended by an error."""
        self._ready.put(error)


class _HiddenStates:
    """A row's hidden states that the caller has not taken, as pieces of the steps' results."""

    def __init__(self) -> None:
        self._num_known = 0  # tokens so far, those that were taken among them
        self._pieces: list[tuple[Sequence[torch.Tensor], slice]] = []

    def add(self, start: int, states: Sequence[torch.Tensor], place: int, num_tokens: int) -> None:
        """Add those of tokens [start, start + num_tokens) that are new; not after a preemption."""
        end = start + num_tokens
        assert start <= self._num_known, "tokens were left out"
        if end > self._num_known:
            skipped = self._num_known - start
            self._pieces.append((states, slice(place + skipped, place + num_tokens)))
            self._num_known = end

    def take(self) -> list[torch.Tensor]:
        """[num_tokens, hidden_size] of each hidden state."""
        pieces, self._pieces = self._pieces, []
        if len(pieces) == 1:
            states, rows = pieces[0]
            return [state[rows] for state in states]
        layers = zip(*[[state[rows] for state in states] for states, rows in pieces], strict=True)
        return [torch.cat(layer) for layer in layers]
