"""A bursty trace with long tails and prefix trees, drawn from a seed while it is consumed.

Arrivals are a Poisson process of two rates between which a Markov chain switches. A request
begins a conversation with one of a few system prompts, the first of them the most popular, or
goes on from all that was said in one that ended lately: prompts form trees. Users' texts are
log-normal, outputs follow a Pareto law.

Source: Fischer & Meier-Hellstern 1993, doi:10.1016/0166-5316(93)90035-S (modulated arrivals).
"""

from __future__ import annotations

import itertools
import random

BURST_RATE, CALM_RATE = 3.0, 0.5  # of the mean rate
BURST_LENGTH, CALM_LENGTH = 20, 80  # mean, in arrivals at the mean rate

NUM_SYSTEM_PROMPTS, SYSTEM_MEDIAN, SYSTEM_SIGMA = 32, 256, 0.7
TEXT_MEDIAN, TEXT_SIGMA = 64, 1.2
OUTPUT_LEAST, OUTPUT_ALPHA = 48, 1.5  # mean: three times the least

CONTINUES = 0.6  # part of the requests that go on with a conversation
NUM_REMEMBERED = 1024  # conversations that may be gone on with; the rest is forgotten
MEAN_RECENCY = 128  # how many of them have ended since


class Trace:
    """Requests one after the other; it keeps nothing of those that are taken.

    The same seed gives the same trace at any rate, faster or slower, but for which conversations
    have ended when one is to be gone on with. Token ids are bytes.

    Args:
        rate: Mean requests per second.
        max_model_len: Longest prompt and output together.
    Attributes:
        next_time: When the next request arrives, in seconds.
    """

    def __init__(self, rate: float, max_model_len: int, seed: int) -> None:
        if not rate > 0:
            raise ValueError(f"requests per second must be more than 0, got {rate}")
        if max_model_len < 16:
            raise ValueError(f"a trace needs sequences of 16 tokens or more, got {max_model_len}")
        self.max_model_len = max_model_len
        self._rate = rate
        self._times, self._draw = random.Random(seed), random.Random(seed + 1)
        lengths = [
            self._log_normal(SYSTEM_MEDIAN, SYSTEM_SIGMA, max_model_len // 4)
            for _ in range(NUM_SYSTEM_PROMPTS)
        ]
        self._system_prompts = [self._draw.randbytes(length) for length in lengths]
        weights = [1 / place for place in range(1, NUM_SYSTEM_PROMPTS + 1)]  # Zipf's law
        self._popularity = list(itertools.accumulate(weights))
        self._ended: list[bytes] = []
        self._bursts, self._switch_time = True, 0.0
        self.next_time = 0.0
        self._advance()

    def take(self) -> tuple[list[int], int]:
        """The next request: prompt ids, number of output tokens."""
        output = int(min(OUTPUT_LEAST * self._draw.paretovariate(OUTPUT_ALPHA), 2**31))
        output = min(output, self.max_model_len // 2)
        text = self._draw.randbytes(
            self._log_normal(TEXT_MEDIAN, TEXT_SIGMA, self.max_model_len // 4)
        )
        history = None
        if self._ended and self._draw.random() < CONTINUES:
            recency = int(self._draw.expovariate(1 / MEAN_RECENCY))
            history = self._ended.pop(max(0, len(self._ended) - 1 - recency))
        if history is None or len(history) + len(text) + output > self.max_model_len:
            (history,) = self._draw.choices(self._system_prompts, cum_weights=self._popularity)
        self._advance()
        return list(history + text), output

    def ended(self, token_ids: bytes) -> None:
        """A conversation of these tokens, prompt and output, may be gone on with from now on."""
        self._ended.append(token_ids)
        if len(self._ended) > NUM_REMEMBERED:
            del self._ended[0]

    def _advance(self) -> None:
        """Draw the time of the next arrival."""
        while True:
            rate = self._rate * (BURST_RATE if self._bursts else CALM_RATE)
            arrival = self.next_time + self._times.expovariate(rate)
            if arrival <= self._switch_time:
                self.next_time = arrival
                return
            self.next_time = self._switch_time  # what comes later is drawn anew: no memory
            self._bursts = not self._bursts
            length = BURST_LENGTH if self._bursts else CALM_LENGTH
            self._switch_time += self._times.expovariate(self._rate / length)

    def _log_normal(self, median: float, sigma: float, high: int) -> int:
        return max(1, min(high, int(median * self._draw.lognormvariate(0, sigma))))
