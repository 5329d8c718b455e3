"""Paired differences of a few seeds: mean, confidence interval, two-sided p-value, and Holm's correction for several arms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
ROUNDING = 1e-9
"""Differences that vary by less of their mean are the same."""


class Paired(NamedTuple):
    """Differences of pairs. With a single pair, or differences that are all the same, there is neither interval nor p-value: they
    are None. The t-test takes them to be about normal, and cannot say how sure a difference without any spread is."""

    mean: float
    deviation: float | None
    """Sample standard deviation of the differences."""
    low: float | None
    high: float | None
    """Interval of `CONFIDENCE`, by Student's t with n - 1 degrees of freedom."""
    p: float | None
    """Of the two-sided paired t-test; 1 if no pair differs."""
    pairs: int


def compare_pairs(differences: Sequence[float]) -> Paired:
    """What the differences of at least one pair say of their mean."""
    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return Paired(mean, None, None, None, None, 1)
    deviation = statistics.stdev(differences)
    if deviation <= ROUNDING * abs(mean):
        return Paired(mean, deviation, None, None, None if mean else 1.0, count)
    error = deviation / math.sqrt(count)
    half = find_quantile(CONFIDENCE, count - 1) * error
    p = max(0.0, 1 - find_probability(mean / error, count - 1))
    return Paired(mean, deviation, mean - half, mean + half, p, count)


def find_probability(t: float, freedom: int) -> float:
    """P(|T| <= |t|) of Student's t with a whole number of degrees of freedom: the finite series of Abramowitz and Stegun 1964,
    26.7.3 and 26.7.4."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2 == 1
    term = cosine if is_odd else 1.0
    total = 0.0
    for power in range(3 if is_odd else 2, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (power - 1) / power
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def find_quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| <= t) = confidence, by bisection."""
    low, high = 0.0, 1.0
    while find_probability(high, freedom) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if find_probability(middle, freedom) < confidence else (low, middle)
    return high


def adjust_holm(values: Sequence[float]) -> list[float]:
    """p-values that hold for all comparisons together (Holm 1979, A simple sequentially rejective multiple test procedure)."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted
