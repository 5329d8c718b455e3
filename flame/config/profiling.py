"""Options that make a run record its own work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from flame.config.types import Section, option

if TYPE_CHECKING:
    from flame.config.schema import JobConfig

SPAN = re.compile(r"([1-9]\d{0,17})(?:-([1-9]\d{0,17}))?")  # Python reads no number of thousands of digits
ALL_RANKS = "all"


def read_spans(text: str) -> list[tuple[int, int]] | None:
    """The spans of steps in a text such as "20-22, 500": first and last of each, in order. None if it holds anything else, or
    spans that overlap."""
    spans = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        found = SPAN.fullmatch(part)
        if found is None:
            return None
        first = int(found[1])
        spans.append((first, int(found[2] or first)))
    spans.sort()
    starts_and_ends = [step for span in spans for step in span]
    is_ordered = starts_and_ends == sorted(starts_and_ends)
    is_apart = all(before[1] < after[0] for before, after in pairwise(spans))
    return spans if is_ordered and is_apart else None


@dataclass(kw_only=True)
class Profiling(Section):
    """What a run records of its own work, in profile/ in job.dump_folder (docs/profiling.md). Nothing is recorded by default."""

    trace_steps: str = option("", is_silent=True)
    """Steps to trace, such as "20-22,500". Each span becomes a file that Perfetto and chrome://tracing show."""
    memory_steps: str = option("", is_silent=True)
    """Steps after which a snapshot of the GPU's memory is written, such as "1,10"."""
    memory_history: bool = option(False, is_silent=True)
    """Record which line of code took each block of GPU memory, from the start on. Snapshots then tell, also the one that is
    written when memory runs out."""
    ranks: str = option("0", is_silent=True)
    """Ranks that write traces and snapshots: numbers separated by commas, or "all"."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        for key in ("trace_steps", "memory_steps"):
            if read_spans(getattr(self, key)) is None:
                yield (
                    f'profiling.{key} = "{getattr(self, key)}": allowed are steps and spans of steps that do not overlap, '
                    'separated by commas, such as "20-22,500"'
                )
        listed = [part.strip() for part in self.ranks.split(",")]
        if self.ranks != ALL_RANKS and not all(re.fullmatch(r"\d{1,9}", part) and int(part) < job.world_size for part in listed):
            yield (
                f'profiling.ranks = "{self.ranks}": allowed are "{ALL_RANKS}", or ranks below {job.world_size}, separated by '
                "commas"
            )

    def includes_rank(self, rank: int) -> bool:
        """Whether a rank writes."""
        return self.ranks == ALL_RANKS or rank in {int(part) for part in self.ranks.split(",")}
