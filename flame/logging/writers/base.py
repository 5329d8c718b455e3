"""Base class of metric loggers. Derive from `MetricWriter` to add a service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class RunIdentity:
    """What a writer knows about the run."""

    folder: Path
    """Folder of the run."""
    start_step: int
    """Steps done at the resumed checkpoint; 0 for a new run. Later steps that an earlier process logged are invalid."""
    description: str
    """`job.description`"""
    options: dict[str, Any]
    """All options, as nested dictionaries of plain values."""
    service_id: str | None
    """`MetricWriter.service_id` from the run's checkpoint; None for a new run."""


class MetricWriter:
    """Writes the metrics of a run to one service. Only rank 0 has writers.

    A writer that raises an error is switched off with a warning, and the run continues. metrics.jsonl has all metrics.

    Raises:
        UserError: the service is not installed or does not start.
    """

    name: ClassVar[str] = ""
    """Name of the service in log lines."""

    def __init__(self, run: RunIdentity):
        pass

    @property
    def service_id(self) -> str | None:
        """Identity of the run at the service, stored in checkpoints. None if the service needs none."""
        return None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of one step. Values may be infinite or NaN."""
        raise NotImplementedError

    def log_texts(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        """Write texts of one step, such as "completions": rows with the same columns. Only services that show texts define it."""

    def sync(self) -> None:
        """Make sure that all metrics are on the disk. Called before the checkpoint of the same step is committed."""

    def close(self) -> None:
        """Finish writing."""
