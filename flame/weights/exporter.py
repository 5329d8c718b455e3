"""When a run exports its model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch.distributed as dist

from flame.checkpoints.checkpoint import SLOWEST_SAVE, Checkpointer
from flame.checkpoints.checkpoint_agreement import run_on_main
from flame.config import JobConfig
from flame.weights.hf_export import convert


class Exporter:
    """Exports of one run while it trains, from its committed checkpoints. All ranks call it at the same point of the run."""

    def __init__(self, config: JobConfig, checkpointer: Checkpointer):
        self._config = config
        self._checkpointer = checkpointer
        self._folder = Path(config.job.dump_folder)
        # Its own group: a slow disk is no dead rank.
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST_SAVE)

    def is_due(self, step: int) -> bool:
        """Every `checkpoint.export_interval` steps, but not at the last step, which is exported to `hf/`."""
        interval = self._config.checkpoint.export_interval
        return bool(interval) and 0 < step < self._config.training.steps and step % interval == 0

    def export_when_due(self, step: int, *, again: bool = True) -> None:
        """Write `hf-step-N/` if it is due. Rank 0 does, while the others wait.

        Args:
            again: replace what is there. False after a resume: only what a run that was cut short owes.

        Raises:
            UserError, RankFailure: it could not be written.
        """
        if self.is_due(step):
            self._checkpointer.wait()
            run_on_main(partial(self._export, step, again), self._group)

    def _export(self, step: int, again: bool) -> None:
        out = self._folder / f"hf-step-{step}"
        if again or not out.exists():
            convert(self._checkpointer.folder / f"step-{step}", out, self._config.checkpoint.export_dtype)
