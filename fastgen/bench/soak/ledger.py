"""What became of each request, in memory that does not grow with them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...engine.request import FINISH_REASONS, Request
from ...outputs import TokenEvent
from .orders import Conduct, Order

MAX_SHOWN = 20


@dataclass(frozen=True)
class Ending:
    """An output of a request that is compared with a run alone."""

    reason: str
    token_ids: list[int]

    @property
    def is_whole(self) -> bool:
        return self.reason in ("stop", "length")


class Ledger:
    """Ends by conduct and reason, and what is not as it must be. Of any thread.

    Attributes:
        reasons: Outputs by conduct and reason. cancelled_while: requests by their status when
            they were cancelled. num_ended: orders. num_refused: times that the queue was full.
        num_unseen: outputs of requests that were given up before anybody had them.
        checked: The outputs of the orders that are compared with a run alone.
        num_violations, violations: Their number, and the first of them as text.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reasons: dict[Conduct, Counter[str]] = {conduct: Counter() for conduct in Conduct}
        self.cancelled_while: Counter[str] = Counter()
        self.checked: dict[int, list[Ending]] = {}
        self.num_ended = self.num_refused = self.num_unseen = self.num_violations = 0
        self.violations: list[str] = []

    def violation(self, what: str) -> None:
        with self._lock:
            self.num_violations += 1
            if len(self.violations) < MAX_SHOWN:
                self.violations.append(what)

    def refused(self) -> None:
        """The queue was full; who gave the order will come again."""
        with self._lock:
            self.num_refused += 1

    def cancelled(self, request: Request) -> None:
        """Somebody is about to cancel a request."""
        with self._lock:
            self.cancelled_while[request.status.value] += 1

    def unseen(self, order: Order) -> None:
        """It was given up before its request was handed out."""
        with self._lock:
            self.num_unseen += order.params.n
            self.num_ended += 1

    def failed(self, order: Order, error: BaseException) -> None:
        """Its caller met an error, which none of the conducts has."""
        self.violation(f"{_name(order)}: {type(error).__name__}: {error}")
        with self._lock:
            self.num_ended += 1

    def ended(self, order: Order, request: Request, read: Sequence[TokenEvent] | None) -> None:
        """A request is over.

        read: What its reader has seen; None: there was none.
        """
        endings = []
        for output in request.outputs:
            reason = output.finish_reason or "no end"
            if not output.done.is_set() or reason not in FINISH_REASONS:
                self.violation(f"{_name(order)} has no reason to be over, but {reason!r}")
            if reason not in order.may_end_by:
                self.violation(f"{_name(order)} ended by {reason!r}: {output.error!r}")
            if output.block_ids:
                self.violation(f"{_name(order)} is over and holds blocks")
            endings.append(Ending(reason, list(output.output_token_ids)))
            if read is not None:
                events = [event for event in read if event.index == output.index]
                self._check_read(order, endings[-1], events)
        with self._lock:
            self.reasons[order.conduct].update(ending.reason for ending in endings)
            self.num_ended += 1
            if order.is_checked:
                self.checked[order.index] = endings

    def _check_read(self, order: Order, ending: Ending, events: Sequence[TokenEvent]) -> None:
        token_ids = [token_id for event in events for token_id in event.token_ids]
        reasons = [event.finish_reason for event in events if event.finish_reason is not None]
        if token_ids != ending.token_ids[: len(token_ids)]:
            self.violation(f"{_name(order)}: what was read is not what was generated")
        if reasons and (reasons != [ending.reason] or len(token_ids) < len(ending.token_ids)):
            self.violation(f"{_name(order)}: read to {reasons}, it ended by {ending.reason!r}")

    def check_against(self, finished: Mapping[str, int]) -> None:
        """Whether the engine counted each end once, as it was seen here.

        finished: Outputs by reason, as the engine counts them.
        """
        seen: Counter[str] = Counter()
        for reasons in self.reasons.values():
            seen.update(reasons)
        for reason in sorted({*seen, *finished}):
            missing = finished.get(reason, 0) - seen[reason]
            allowed = self.num_unseen if reason == "cancelled" else 0
            if not 0 <= missing <= allowed:
                self.violation(
                    f"the engine counted {finished.get(reason, 0)} ends by {reason!r}, and "
                    f"{seen[reason]} were seen (up to {allowed} more were never handed out)"
                )

    def compare(self, order: Order, alone: Sequence[Sequence[int]]) -> bool:
        """Compare a checked order with its outputs alone; whether all of it had run."""
        endings = self.checked[order.index]
        for index, (ending, own) in enumerate(zip(endings, alone, strict=True)):
            expected = own if ending.is_whole else own[: len(ending.token_ids)]
            if list(expected) != ending.token_ids:
                self.violation(
                    f"{_name(order)}, output {index}: tokens {ending.token_ids}, alone {list(own)}"
                )
        return all(ending.is_whole for ending in endings)


def _name(order: Order) -> str:
    return f"request {order.index}, which {order.conduct.value},"
