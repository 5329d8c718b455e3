"""Times of functions on the GPU, and tables of them.

What is compared is run in turns, one call of each after the other: a GPU under sustained matrix products is held back by its
power limit, so a function that runs first, on a cool chip, would look faster. Python's garbage collector rests meanwhile, as it
does in training.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from flame.compare.tables import format_table

Function = Callable[[], object]


class CannotRun(Exception):
    """A sampler has given up."""


START = time.perf_counter()


class Sample(NamedTuple):
    """One call."""

    ms: float
    peak_bytes: int
    """Most memory that the process had allocated at once during the call."""
    bytes_before: int
    """Memory that it had allocated when the call began."""


class Timing(NamedTuple):
    """Several calls of one function."""

    median_ms: float
    low_ms: float
    high_ms: float
    peak_gib: float
    """Most memory that the process had allocated at once during a call."""
    added_gib: float
    """Of it, what came on top of what was allocated when the call began."""

    def show(self) -> str:
        return f"{self.median_ms:,.1f} [{self.low_ms:,.1f}, {self.high_ms:,.1f}]"


def sample(function: Function) -> Sample:
    """Call once, and wait for the GPU before and after. Without a GPU memory is not measured."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        function()
        return Sample(1000 * (time.perf_counter() - began), 0, 0)
    torch.cuda.synchronize()
    bytes_before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return Sample(start.elapsed_time(end), torch.cuda.max_memory_allocated(), bytes_before)


def summarize(samples: Sequence[Sample]) -> Timing:
    times = [one.ms for one in samples]
    peak = max(one.peak_bytes for one in samples)
    added = max(one.peak_bytes - one.bytes_before for one in samples)
    return Timing(statistics.median(times), min(times), max(times), peak / 2**30, added / 2**30)


def measure(function: Function, repeats: int, warmup: int) -> Timing:
    """Time `repeats` calls after `warmup` calls that do not count.

    Raises:
        torch.OutOfMemoryError: of the function.
    """
    with collector_at_rest():
        for _ in range(warmup):
            function()
        return summarize([sample(function) for _ in range(repeats)])


def measure_side_by_side(functions: Mapping[str, Function], repeats: int, warmup: int) -> dict[str, Timing | None]:
    """Time functions in turns: a, b, a, b, ... A function that runs out of memory gets None, and the others go on."""
    return measure_in_turns({name: partial(sample, function) for name, function in functions.items()}, repeats, warmup)


def measure_in_turns(samplers: Mapping[str, Callable[[], Sample]], repeats: int, warmup: int) -> dict[str, Timing | None]:
    """As `measure_side_by_side`, of what brings its own samples: another process, for one. `CannotRun` gives None too."""
    samples: dict[str, list[Sample]] = {name: [] for name in samplers}
    failed: set[str] = set()
    with collector_at_rest():
        for _ in range(warmup + repeats):
            gc.collect(1)
            for name, take in samplers.items():
                if name in failed:
                    continue
                try:
                    samples[name].append(take())
                except (torch.OutOfMemoryError, CannotRun):
                    failed.add(name)
                if name in failed:  # only here has the traceback let go of the tensors
                    gc.collect()
                    torch.cuda.empty_cache()
    return {name: None if name in failed else summarize(taken[warmup:]) for name, taken in samples.items()}


@contextmanager
def collector_at_rest() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def note(text: str) -> None:
    """To standard error, with the seconds since this module was imported."""
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", file=sys.stderr, flush=True)


class Report:
    """Markdown that is printed and kept in a file as it comes."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def write(self, text: str) -> None:
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.write("\n".join(["", title, "", *format_table(header, rows)]))
