"""metrics.jsonl: the metrics of a run, which every run writes."""

from __future__ import annotations

import json
import math
from typing import ClassVar

from flame.errors import UserError
from flame.logging.writers.base import MetricWriter, RunIdentity
from flame.runtime.appended_file import AppendedFile
from flame.runtime.json_lines import drop_lines_after

METRICS_FILE = "metrics.jsonl"


class JsonLinesWriter(MetricWriter):
    """Writes one line per logged step or validation. Numbers that are not finite are null."""

    name: ClassVar[str] = METRICS_FILE

    def __init__(self, run: RunIdentity):
        path = run.folder / METRICS_FILE
        drop_lines_after(path, run.start_step)
        self._file = AppendedFile(path)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of one step.

        Raises:
            UserError: the file cannot be written, or the run's folder is gone.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **finite}, allow_nan=False))
        except OSError as error:
            raise UserError(
                f'"{self._file.path}" cannot be written ({error.strerror}): fix that, and the same command continues from '
                "the last checkpoint"
            ) from error

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()
