"""Finds the rank that holds the others up, and why.

All ranks of a step end together, since each collective waits for the slowest. So the step time says nothing of who was slow.
Three times of a rank are its own: how long it waits for data, how long it takes to hand the step's work to its GPU, and how long
its device takes for a matrix product that is the same everywhere.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

MARGIN = 0.1
"""A rank is slow if it holds the others up by more than this share of a step."""
LINES_KEPT = 5
"""Log lines over whose medians ranks are compared: a single pause is no straggler."""
LINES_BETWEEN_REPORTS = 20
PROBE_SIZES = {"cuda": 2048, "cpu": 256}
PROBE_PRODUCTS = 8


class OwnTimes(NamedTuple):
    """Seconds of one rank that do not depend on the others."""

    data: float
    """A step's wait for data."""
    launch: float
    """Handing a step's work to the GPU; 0 on CPUs, where it is the work itself."""
    product: float
    """The probe."""


PHASES = {
    "data": "waits for data {own:.3f} s a step, the others {others:.3f} s",
    "launch": "takes {own:.3f} s a step to hand its work to the GPU, the others {others:.3f} s: is its CPU busy?",
    "product": "takes {ratio:.2f} times as long as the others for the same matrix product: is its device shared or throttled?",
}
"""By name of `OwnTimes`."""


class Straggler(NamedTuple):
    """A slow rank."""

    rank: int
    phase: str
    """A name of `OwnTimes`."""
    own: float
    others: float
    """Median of the other ranks."""

    def describe(self, hosts: Sequence[str]) -> str:
        """In one line."""
        ratio = self.own / max(self.others, 1e-9)
        found = PHASES[self.phase].format(own=self.own, others=self.others, ratio=ratio)
        return f"rank {self.rank} on {hosts[self.rank]} {found}"


def find_stragglers(times: Sequence[OwnTimes], step_seconds: float) -> list[Straggler]:
    """The ranks that are slower than the median of the others by more than `MARGIN` of a step, worst first.

    Waits and launches are compared in seconds with the step's. The probe is compared as a ratio, since all that a device computes
    takes that much longer.
    """
    found = []
    for phase in OwnTimes._fields:
        values = [getattr(each, phase) for each in times]
        for rank, own in enumerate(values):
            others = statistics.median(value for other, value in enumerate(values) if other != rank)
            share = own / others - 1 if phase == "product" and others else (own - others) / step_seconds
            if share > MARGIN:
                found.append((share, Straggler(rank, phase, own, others)))
    return [straggler for _, straggler in sorted(found, key=lambda each: -each[0])]


class StragglerWatch:
    """Compares the ranks at each log line.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._recent: deque[list[OwnTimes]] = deque(maxlen=LINES_KEPT)
        self._lines_since: dict[tuple[int, str], int] = {}
        hosts: list[str | None] = [None] * dist.get_world_size()
        if len(hosts) > 1:
            dist.all_gather_object(hosts, socket.gethostname())
            size = PROBE_SIZES[device.type]
            own = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
            self._matrix = own.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self._hosts = [host or "" for host in hosts]

    def compare(self, data: float, launch: float, step_seconds: float) -> list[str]:
        """A line for each rank that is slow, and has not been named lately. All ranks call it.

        Args:
            data, launch: seconds a step of this rank since the last line.
            step_seconds: of a step since the last line.
        """
        if len(self._hosts) == 1:
            return []
        own = torch.tensor([data, launch if self._device.type == "cuda" else 0.0, self._time_product()], dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in self._hosts]
        dist.all_gather(gathered, own)
        self._recent.append([OwnTimes(*times.tolist()) for times in gathered])
        if len(self._recent) < LINES_KEPT:
            return []
        middle = [OwnTimes(*map(statistics.median, zip(*of_rank, strict=True))) for of_rank in zip(*self._recent, strict=True)]
        self._lines_since = {key: lines + 1 for key, lines in self._lines_since.items() if lines < LINES_BETWEEN_REPORTS}
        lines = []
        for straggler in find_stragglers(middle, step_seconds):
            key = straggler.rank, straggler.phase
            if key not in self._lines_since:
                self._lines_since[key] = 0
                lines.append(straggler.describe(self._hosts))
        return lines

    def _time_product(self) -> float:
        """Seconds of the probe on this rank's device."""
        self._wait()
        start = time.perf_counter()
        for _ in range(PROBE_PRODUCTS):
            torch.mm(self._matrix, self._matrix)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
