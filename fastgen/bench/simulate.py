"""The scheduler under loads that no machine here could serve, and what its own work costs.

Requests come from a trace, steps take the time that a model gives them, and everything between is
the scheduler as it runs in the engine. What requests see is in virtual time and the same on any
machine; the scheduler's own time is CPU time of this one, and no part of the virtual time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .simulation.engine import Limits
from .simulation.growth import measure_growth
from .simulation.load import Goal, Load, capacity
from .simulation.step_cost import COSTS, StepCost

RATES = ("20%", "40%", "60%", "80%", "100%", "120%")
SIZES = {
    "running": (256, 1024, 4096),
    "short": (256, 1024, 4096),
    "waiting": (1 << 10, 1 << 12, 1 << 14),
    "finished": (1 << 10, 1 << 12, 1 << 14),
    "pool": (1 << 14, 1 << 17, 1 << 20),
}


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    rates: Requests per second, or per cent of the capacity, such as "80%". sizes: of the series
    in growth.py; those that are left out are not measured.
    """

    num_requests: int = 1000
    rates: Sequence[str] = RATES
    limits: Limits = field(default_factory=Limits)
    cost: StepCost = COSTS["cpu-0.5b"]
    goal: Goal = field(default_factory=Goal)
    seed: int = 0
    sizes: Mapping[str, Sequence[int]] = field(default_factory=lambda: SIZES)

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ValueError(f"there must be at least one request, got {self.num_requests}")
        for text in self.rates:
            requests_per_s(text, 1.0)


def requests_per_s(text: str, capacity_per_s: float) -> float:
    """Of "80%" or "3.5". Raises: ValueError for anything else."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(
            f"a rate must be requests per second, or per cent of the capacity such as 80%, "
            f"and more than 0; got {text!r}"
        )
    return number / 100 * capacity_per_s if text.endswith("%") else number


def simulate(setting: Setting) -> dict[str, Any]:
    """Everything; see the keys here, in load.py and in growth.py."""
    limits, cost = setting.limits, setting.cost
    capacity_per_s = capacity(limits, cost, setting.seed)
    loads = []
    for text in setting.rates:
        rate = requests_per_s(text, capacity_per_s)
        load = Load(limits, cost, setting.goal, rate, setting.num_requests, setting.seed)
        loads.append({"load": rate / capacity_per_s, **load.run()})
    where = asdict(setting)
    return {
        "setting": {**where, "rates": list(setting.rates)},
        "capacity_per_s": capacity_per_s,
        "loads": loads,
        "growth": measure_growth(setting.sizes),
    }
