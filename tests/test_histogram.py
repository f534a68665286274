"""Histograms: bounds, exact counts, and quantiles whose error is known."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastgen.histogram import LARGEST_RATIO, NO_COUNTS, NO_SECONDS, Histogram

SMALLEST, LARGEST = NO_SECONDS.bounds[0], NO_SECONDS.bounds[-1]
WRONG_BY = math.sqrt(LARGEST_RATIO) * (1 + 1e-12)  # and a rounding

seconds = st.one_of(
    st.floats(0, 2 * SMALLEST),
    st.floats(SMALLEST, 1.0),
    st.floats(1e-2, 2 * LARGEST),
    st.sampled_from(NO_SECONDS.bounds),
)
whole = st.one_of(st.integers(0, 20), st.integers(0, 2 * 10**7))
shares = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))


def histogram_of(values, like: Histogram = NO_SECONDS) -> Histogram:
    counts = list(like.counts)
    for value in values:
        counts[bisect_left(like.bounds, value)] += 1
    return replace(like, counts=tuple(counts), total=float(sum(values)))


def value_at(share: float, values) -> float:
    """What `quantile` estimates."""
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1]


def test_bounds_grow_by_at_most_the_ratio_that_the_error_is_derived_from():
    ratios = [high / low for low, high in pairwise(NO_SECONDS.bounds)]
    assert max(ratios) == pytest.approx(LARGEST_RATIO)
    assert min(ratios) > 1
    # Of whole numbers the smallest of a bucket is one above the bound below.
    assert all(high / (low + 1) <= LARGEST_RATIO for low, high in pairwise(NO_COUNTS.bounds))
    assert NO_COUNTS.bounds[:9] == (0, 1, 2, 3, 4, 5, 6, 8, 10)


def test_bounds_are_the_decimal_numbers_that_they_print():
    assert {0.001, 0.0025, 0.315, 1.0, 63.0, 10000.0} <= set(NO_SECONDS.bounds)
    assert all(len(repr(bound)) <= 8 for bound in NO_SECONDS.bounds)


@given(st.lists(seconds, min_size=1, max_size=50), shares)
@example([SMALLEST], 1.0)
@example([LARGEST, 2 * LARGEST], 1.0)
@example([0.0, 1.0], 0.5)
def test_error_of_a_quantile_of_times(values, share):
    histogram, true = histogram_of(values), value_at(share, values)
    low, high = histogram.quantile_range(share)
    assert low <= true <= high
    estimate = histogram.quantile(share)
    if true <= SMALLEST:
        assert abs(estimate - true) <= SMALLEST
    elif true > LARGEST:
        assert estimate == LARGEST
    else:
        assert 1 / WRONG_BY <= estimate / true <= WRONG_BY


@given(st.lists(whole, min_size=1, max_size=50), shares)
@example([0], 0.0)
@example([7, 8], 0.5)
def test_error_of_a_quantile_of_whole_numbers(values, share):
    histogram, true = histogram_of(values, NO_COUNTS), value_at(share, values)
    low, high = histogram.quantile_range(share)
    assert low <= true <= high
    estimate = histogram.quantile(share)
    if true <= 6:
        assert estimate == pytest.approx(true)
    elif true > NO_COUNTS.bounds[-1]:
        assert estimate == NO_COUNTS.bounds[-1]
    else:
        assert 1 / WRONG_BY <= estimate / true <= WRONG_BY


@given(st.lists(seconds, max_size=50))
def test_what_is_exact(values):
    histogram = histogram_of(values)
    assert histogram.count == len(values)
    assert histogram.mean == (pytest.approx(sum(values) / len(values)) if values else None)
    for bound in (SMALLEST, 0.1, 1.0, LARGEST):
        assert histogram.num_up_to(bound) == sum(value <= bound for value in values)


def test_nothing_has_no_quantile():
    assert NO_SECONDS.count == 0
    assert NO_SECONDS.quantile(0.5) is NO_SECONDS.quantile_range(0.5) is NO_SECONDS.mean is None
    assert repr(NO_SECONDS) == "Histogram(count=0)"


def test_print_is_short():
    text = repr(histogram_of([0.01] * 99 + [1.0]))
    assert text == "Histogram(count=100, mean=0.0199, p50=0.008944, p90=0.008944, p99=0.008944)"


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_outside_of_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        histogram_of([1.0]).quantile(share)


@pytest.mark.parametrize("bound", [0.0011, 0.0, 1e9])
def test_a_number_between_the_bounds_is_refused(bound):
    with pytest.raises(ValueError, match="not a bound"):
        NO_SECONDS.num_up_to(bound)


def test_equal_values_make_equal_histograms():
    assert histogram_of([1.0, 2.0]) == histogram_of([2.0, 1.0])
    assert histogram_of([1.0]) != histogram_of([2.0])
    assert len({histogram_of([1.0]), histogram_of([1.0])}) == 1
