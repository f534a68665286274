"""What a step costs: seconds = fixed + per_token * computed tokens + per_read * tokens read."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.scheduler_output import SchedulerOutput


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step.

    fixed_s: of any step: the weights are read. per_token_s: for each token that is computed.
    per_read_s: for each token whose keys and values are read from the cache, once per sequence.
    source: where the three are from.
    """

    fixed_s: float
    per_token_s: float
    per_read_s: float
    source: str

    def __post_init__(self) -> None:
        if min(self.fixed_s, self.per_token_s, self.per_read_s) < 0 or not self.fixed_s:
            raise ValueError(
                "a step must cost more than 0 s, and nothing less than 0 s per token, got "
                f"{self.fixed_s}, {self.per_token_s}, {self.per_read_s}"
            )

    def seconds(self, output: SchedulerOutput) -> float:
        """Of one step; the tokens it computes itself are not read from the cache."""
        decodes = output.decodes
        num_read = int(decodes.seq_lens.sum()) - len(decodes)
        num_read += sum(item.start for item in output.items)
        return self.fixed_s + self.per_token_s * output.num_tokens + self.per_read_s * num_read


# cpu-0.5b, of the figures in PERFORMANCE.md: a step of one sequence takes 33 ms; a prompt of 2048
# tokens 939 ms, so (939 - 33) / 2047 per token; attention over 32 sequences of 400 tokens 0.4 ms
# in each of 24 layers.
# h100-8b-floor, by formula: 8.03e9 parameters of 2 bytes, 32 layers of 8 KV heads x 128; 3350 GB/s
# and 989 TFLOP/s. No step can be faster; what a real one takes has not been measured.
COSTS = {
    "cpu-0.5b": StepCost(
        0.033,
        0.906 / 2047,
        24 * 0.4e-3 / (32 * 400),
        "measured: fastgen, the shape of Qwen2.5-0.5B in bf16, 2 cores with AMX",
    ),
    "h100-8b-floor": StepCost(
        8.03e9 * 2 / 3350e9,
        8.03e9 * 2 / 989e12,
        32 * 8 * 128 * 2 * 2 / 3350e9,
        "not measured: data sheet of one H100, the shape of Llama-3.1-8B in bf16",
    ),
}


def parse_cost(text: str) -> StepCost:
    """A name of COSTS, or FIXED,TOKEN,READ in seconds. Raises: ValueError for anything else."""
    if text in COSTS:
        return COSTS[text]
    try:
        fixed, per_token, per_read = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"a step's cost must be {' or '.join(COSTS)}, or three numbers of seconds "
            f"FIXED,TOKEN,READ such as 0.03,4e-4,1e-6; got {text!r}"
        ) from None
    return StepCost(fixed, per_token, per_read, "given")
