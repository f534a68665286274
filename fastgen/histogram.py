"""Distributions in constant memory: how many values fell between bounds that are fixed."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

# Steps of a decade that are all about as large: the preferred numbers R10 of ISO 3.
_STEPS = ("1", "1.25", "1.6", "2", "2.5", "3.15", "4", "5", "6.3", "8")
# The widest of them, 1.25 to 1.6.
LARGEST_RATIO = 1.28


def _decades(first: int, last: int) -> tuple[float, ...]:
    """Bounds from 10**first to 10**last."""
    exponents = range(first, last)
    return (*(float(f"{step}e{power}") for power in exponents for step in _STEPS), 10.0**last)


@dataclass(frozen=True, repr=False)
class Histogram:
    """How many values, none of them negative, fell between fixed bounds.

    counts: [len(bounds) + 1], counts[i] for values in (bounds[i - 1], bounds[i]]; the first holds
    all up to bounds[0], the last all that are larger than every bound. total: the values' sum.
    whole: They are whole numbers.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0.0
    whole: bool = False

    @property
    def count(self) -> int:
        return self._cumulative[-1]

    @property
    def mean(self) -> float | None:
        """Exact; None if there are no values."""
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """About the ceil(share * count)-th smallest value; None if there are none.

        The geometric middle of `quantile_range`. So with the bounds of this module the estimate
        is wrong by a factor of at most sqrt(LARGEST_RATIO), 13.2 %; below the smallest bound by
        at most that bound; a value above the largest is estimated as the largest bound.

        Raises: ValueError if share is not in [0, 1].
        """
        between = self.quantile_range(share)
        if between is None:
            return None
        return min(math.sqrt(between[0] * between[1]), self.bounds[-1])

    def quantile_range(self, share: float) -> tuple[float, float] | None:
        """Two numbers between which, themselves included, that value certainly lies."""
        if not 0 <= share <= 1:
            raise ValueError(f"the share of a quantile must be in [0, 1], got {share}")
        if not self.count:
            return None
        rank = max(1, math.ceil(share * self.count))
        place = bisect_left(self._cumulative, rank)
        high = self.bounds[place] if place < len(self.bounds) else math.inf
        if place == 0:
            return 0.0, high
        return self.bounds[place - 1] + self.whole, high

    def num_up_to(self, bound: float) -> int:
        """How many values are <= bound, which must be one of the bounds.

        Raises: ValueError if it is not.
        """
        place = bisect_left(self.bounds, bound)
        if place == len(self.bounds) or self.bounds[place] != bound:
            raise ValueError(f"{bound} is not a bound of this histogram")
        return self._cumulative[place]

    def summary(self) -> dict[str, Any]:
        """What fits in a line: count, mean and some quantiles."""
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
        quantiles = {name: self.quantile(share) for name, share in shares.items()}
        return {"count": self.count, "mean": self.mean, **quantiles}

    @cached_property
    def _cumulative(self) -> list[int]:
        return list(accumulate(self.counts))

    def __repr__(self) -> str:
        if not self.count:
            return "Histogram(count=0)"
        parts = (f"{name}={value:.4g}" for name, value in self.summary().items())
        return f"Histogram({', '.join(parts)})"


def _empty(bounds: tuple[float, ...], whole: bool) -> Histogram:
    return Histogram(bounds, (0,) * (len(bounds) + 1), whole=whole)


# From 10 us to 10,000 s, and whole numbers from 0 to ten million.
NO_SECONDS = _empty(_decades(-5, 4), whole=False)
NO_COUNTS = _empty((0.0, *sorted({float(int(bound)) for bound in _decades(0, 7)})), whole=True)
