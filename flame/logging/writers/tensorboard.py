"""Writes TensorBoard events to tb/ in the run's folder."""

from __future__ import annotations

from typing import ClassVar

from flame.errors import UserError
from flame.logging.writers.base import MetricWriter, RunIdentity
from flame.logging.writers.panels import name_panels


class TensorBoardWriter(MetricWriter):
    """Enabled by `metrics.enable_tensorboard`."""

    name: ClassVar[str] = "tensorboard"

    def __init__(self, run: RunIdentity):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"metrics.enable_tensorboard = true: {error}; pip install tensorboard, or set metrics.enable_tensorboard = false"
            ) from error
        self._events = SummaryWriter(str(run.folder / "tb"), purge_step=run.start_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in name_panels(values).items():
            self._events.add_scalar(name, value, step)
        # Steps before a checkpoint are not repeated. If a crash lost them, the curve would have a gap.
        self._events.flush()

    def log_texts(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        for number, row in enumerate(rows):
            text = "\n\n".join(f"**{column}**\n\n    " + value.replace("\n", "\n    ") for column, value in row.items())
            self._events.add_text(f"evaluation/{name}/{number}", text, step)
        self._events.flush()

    def close(self) -> None:
        self._events.close()
