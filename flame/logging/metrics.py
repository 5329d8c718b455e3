"""Metrics of a run, accumulated over steps and reduced over ranks.

Recording never waits for the device. Only `collect` communicates and synchronizes.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.distributed as dist

from flame.runtime.measures import Last, Max, Mean, Measure, Sum

Value = float | torch.Tensor


class Metrics:
    """Accumulates metrics and reduces them over all ranks. The method that records a metric decides its reduction.

    Values are Python numbers or 0-d tensors of any dtype and device. Autograd graphs are not kept. All arithmetic is float64.
    All ranks must record the same names between two calls of `collect`.
    """

    def __init__(self, device: torch.device):
        """
        Args:
            device: holds and reduces the tensors; must suit the backend of the process group.
        """
        self._device = device
        self._clear()

    def record_mean(self, name: str, total: Value, count: Value) -> None:
        """Record a sum over `count` items. The metric is the mean over all items of all records and ranks."""
        self._add(self._totals, name, total)
        self._add(self._counts, name, count)

    def record_sum(self, name: str, value: Value) -> None:
        """Record a term of a sum over all records and ranks."""
        self._add(self._sums, name, value)

    def record_max(self, name: str, value: Value) -> None:
        """Record a value. The metric is the largest one over all records and ranks. One NaN makes it NaN."""
        new = self._to_tensor(self._own(value))
        self._maxima[name] = torch.maximum(self._to_tensor(self._maxima[name]), new) if name in self._maxima else new

    def record_last(self, name: str, value: Value) -> None:
        """Record a value that replaces the previous one. Not reduced: each rank gets its own back."""
        self._lasts[name] = self._own(value)

    def record(self, name: str, measure: Measure) -> None:
        """Record a number with the reduction that it declares."""
        match measure:
            case Mean(total, count):
                self.record_mean(name, total, count)
            case Sum(value):
                self.record_sum(name, value)
            case Max(value):
                self.record_max(name, value)
            case Last(value):
                self.record_last(name, value)

    def record_zero(self, name: str, measure: Measure) -> None:
        """Record only the name, which all ranks must share. The value does not count, except that of `Last`."""
        match measure:
            case Mean():
                self.record_mean(name, 0.0, 0)
            case Sum():
                self.record_sum(name, 0.0)
            case Max():
                self.record_max(name, -math.inf)
            case Last(value):
                self.record_last(name, value)

    def collect(self) -> dict[str, float]:
        """Reduce all records since the last call over the default process group, if there is one, and clear them.

        A collective call. A mean without items is left out.
        """
        means, sums, maxima, lasts = (sorted(d) for d in (self._totals, self._sums, self._maxima, self._lasts))
        assert len({*means, *sums, *maxima, *lasts}) == len(means) + len(sums) + len(maxima) + len(lasts), (
            "a metric was recorded with two reductions"
        )
        added = self._pack(
            [self._totals[name] for name in means] + [self._counts[name] for name in means] + [self._sums[name] for name in sums]
        )
        largest = self._pack([self._maxima[name] for name in maxima])
        last = self._pack([self._lasts[name] for name in lasts])
        self._clear()

        # Reducing by maximum may lose a NaN, reducing by sum does not.
        added_and_nans = torch.cat([added, largest.isnan()])
        if dist.is_initialized():
            self._check_same_names([means, sums, maxima, lasts])
            if len(added_and_nans):
                dist.all_reduce(added_and_nans)
            if len(largest):
                dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        added, nans = added_and_nans.split([len(added), len(largest)])
        largest = largest.masked_fill(nans > 0, torch.nan)

        numbers = iter(torch.cat([added, largest, last]).tolist())
        totals = [next(numbers) for _ in means]
        counts = [next(numbers) for _ in means]
        collected = {name: total / count for name, total, count in zip(means, totals, counts, strict=True) if count != 0}
        return collected | dict(zip([*sums, *maxima, *lasts], numbers, strict=True))

    def _clear(self) -> None:
        self._totals: dict[str, Value] = {}
        self._counts: dict[str, Value] = {}
        self._sums: dict[str, Value] = {}
        self._maxima: dict[str, Value] = {}
        self._lasts: dict[str, Value] = {}

    def _add(self, sums: dict[str, Value], name: str, value: Value) -> None:
        sums[name] = sums.get(name, 0.0) + self._own(value)

    def _own(self, value: Value) -> Value:
        """A copy, so that later in-place changes by the caller have no effect."""
        if not isinstance(value, torch.Tensor):
            return float(value)
        assert value.ndim == 0, f"a metric is one number, not a tensor of shape {tuple(value.shape)}"
        return value.detach().to(device=self._device, dtype=torch.float64, copy=True)

    def _to_tensor(self, value: Value) -> torch.Tensor:
        # torch.tensor would copy from the host and wait for the device; torch.full does not.
        return value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=torch.float64, device=self._device)

    def _pack(self, values: list[Value]) -> torch.Tensor:
        """Stack values to float64 `[len(values)]` on the device."""
        if not values:
            return torch.empty(0, dtype=torch.float64, device=self._device)
        return torch.stack([self._to_tensor(value) for value in values])

    def _check_same_names(self, names: list[list[str]]) -> None:
        """Check that all ranks recorded the same names. Reductions go by position, so others would be mixed up or hang."""
        digest = int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7])
        extremes = torch.tensor([digest, -digest], device=self._device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        largest, negated_smallest = extremes.tolist()
        assert largest == -negated_smallest, f"ranks recorded different metrics; rank {dist.get_rank()} has {names}"
