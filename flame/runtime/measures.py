"""Numbers to log, with their reduction over micro-steps, steps and ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    Value = float | Tensor
    """A Python number, or a 0-d tensor of any dtype on any device."""


class Mean(NamedTuple):
    """A sum over some items. Reduced to the mean over all items. The metric is left out if there are no items."""

    total: Value
    items: Value


class Sum(NamedTuple):
    """A term of a sum."""

    value: Value


class Max(NamedTuple):
    """A value of which the largest is kept. One NaN makes the metric NaN."""

    value: Value


class Last(NamedTuple):
    """A value that replaces the previous one. Not reduced: each rank keeps its own."""

    value: Value


Measure = Mean | Sum | Max | Last
Measures = dict[str, Measure]
"""Measures by name of the metric. At each point of the run, all ranks must use the same names."""
