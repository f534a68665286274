"""Values that no numeric field takes, and tables of a field's good and bad values."""

from __future__ import annotations

import math

import numpy as np
import pytest

# In no field of either class is one of these a number.
NOT_NUMBERS = [
    True,
    False,
    "1",
    "",
    b"1",
    [1],
    (1,),
    {1},
    object(),
    1j,
    math.nan,
    math.inf,
    -math.inf,
]
NOT_INTS = [*NOT_NUMBERS, 1.0, 1.5, np.float64(1.0)]
HUGE = [2**31, 2**63, 10**400]


def value_id(value: object) -> str:
    text = repr(value)
    if "object at" in text:
        return "object"
    return text if len(text) < 30 else f"{text[:5]}..({len(text)} digits)"


def cases(table: dict[str, list]) -> list:
    return [
        pytest.param(name, value, id=f"{name}={value_id(value)}")
        for name, values in table.items()
        for value in values
    ]


def check_refused(cls, table: dict[str, list], error: type[Exception]) -> None:
    """Every value is refused with `error`, naming the field."""
    for name, values in table.items():
        for value in values:
            with pytest.raises(error, match=name):
                cls(**{name: value})
