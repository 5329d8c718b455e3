"""The t-distribution against tables and an integral, Holm's correction against its definition."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.compare.statistics import adjust_holm, compare_pairs, find_probability, find_quantile


@pytest.mark.parametrize(
    ("freedom", "confidence", "quantile"),
    [(1, 0.95, 12.7062), (2, 0.95, 4.3027), (3, 0.99, 5.8409), (4, 0.95, 2.7764), (9, 0.9, 1.8331), (30, 0.95, 2.0423)],
)
def test_quantiles_are_those_of_the_printed_tables(freedom: int, confidence: float, quantile: float):
    assert find_quantile(confidence, freedom) == pytest.approx(quantile, abs=5e-5)


@given(freedom=st.integers(1, 12), t=st.floats(0, 20))
def test_the_probability_is_the_integral_of_the_density(freedom: int, t: float):
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    points = np.linspace(0, t, 20_001)
    density = scale * (1 + points**2 / freedom) ** (-(freedom + 1) / 2)
    assert find_probability(-t, freedom) == pytest.approx(2 * np.trapezoid(density, points), abs=1e-6)


def test_the_sleep_of_student_1908():
    """Ten patients, hours of sleep gained under two drugs: mean 1.58, t = 4.0621, p = 0.002833, interval 0.70 to 2.46."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = compare_pairs([b - a for a, b in zip(first, second, strict=True)])
    assert found.mean == pytest.approx(1.58) and found.p == pytest.approx(0.002833, abs=5e-7) and found.pairs == 10
    assert (found.low, found.high) == (pytest.approx(0.7001, abs=5e-5), pytest.approx(2.4599, abs=5e-5))


def test_an_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.3, 1.0, (4000, 3))
    covered = [found.low <= 0.3 <= found.high for found in map(compare_pairs, draws.tolist())]
    assert statistics.fmean(covered) == pytest.approx(0.95, abs=0.012)


def test_too_few_or_equal_pairs():
    assert compare_pairs([0.5]) == (0.5, None, None, None, None, 1)
    assert compare_pairs([0.0, 0.0]).p == 1.0
    for differences in ([0.25, 0.25], [0.7 - 0.6, 0.8 - 0.7, 0.9 - 0.8]):  # the latter are equal but for rounding
        found = compare_pairs(differences)
        assert found.mean == pytest.approx(differences[0]) and found.deviation == pytest.approx(0, abs=1e-15)
        assert (found.low, found.high, found.p, found.pairs) == (None, None, None, len(differences))
    assert compare_pairs([0.25, 0.2501]).p is not None


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_the_closed_test_of_bonferroni(values: list[float]):
    """An adjusted value is the largest Bonferroni p-value of all subsets of hypotheses that hold this one."""
    places = range(len(values))
    subsets = [subset for size in range(1, len(values) + 1) for subset in itertools.combinations(places, size)]
    expected = [
        max(min(1.0, len(subset) * min(values[other] for other in subset)) for subset in subsets if place in subset)
        for place in places
    ]
    assert adjust_holm(values) == pytest.approx(expected)
