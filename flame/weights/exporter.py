"""Exports of a run while it trains."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch.distributed as dist

from flame.checkpoints.manager import HF_FOLDER, SLOWEST_SAVE, Checkpointer
from flame.config.run import Checkpoint
from flame.runtime.agreement import run_on_main
from flame.weights.export import convert
from flame.weights.replacing import check_replaceable
from flame.weights.upload import Uploader


class Exporter:
    """Exports committed checkpoints of one run while it trains. All ranks call it at the same point of the run.

    Args:
        folder: of the run.
        total_steps: `training.steps`.
    """

    def __init__(self, options: Checkpoint, folder: Path, total_steps: int, checkpointer: Checkpointer):
        self._options, self._folder, self._total_steps = options, folder, total_steps
        self._checkpointer = checkpointer
        # A separate group with a long timeout, since the disk may be slow.
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST_SAVE)
        uploads = bool(options.enable_checkpoint and options.export_hf and options.export_to) and dist.get_rank() == 0
        self._uploader = Uploader(folder, options.export_to) if uploads else None

    def is_due(self, step: int) -> bool:
        """Whether to export: every `checkpoint.export_interval` steps, except the last step, which is exported to `hf/`."""
        options = self._options
        interval = options.export_interval if options.enable_checkpoint and options.export_hf else 0
        return bool(interval) and 0 < step < self._total_steps and step % interval == 0

    def catch_up(self, step: int) -> None:
        """Export the checkpoint that a run goes on from if its export was interrupted, and upload what is not uploaded yet.

        Raises:
            UserError, RankFailure: as `export_when_due`.
        """
        self.export_when_due(step, again=False)
        if self._uploader is not None:
            self._uploader.add_all()  # they go on while the run does

    def upload_rest(self) -> None:
        """Upload what is not uploaded yet, and wait for it. Needs no other rank."""
        if self._uploader is not None:
            self._uploader.add_all()
            self._uploader.wait()

    def prepare(self, step: int) -> None:
        """Check, before training, that what the run will export may take the place of what is there.

        Args:
            step: that is done.

        Raises:
            UserError: it may not.
        """
        if self._options.enable_checkpoint and self._options.export_hf:
            run_on_main(partial(self._check_places, step), self._group)

    def _check_places(self, step: int) -> None:
        def is_written(name: str) -> bool:
            match = re.fullmatch(r"hf-step-(\d+)", name)
            return name == HF_FOLDER or (match is not None and int(match[1]) > step and self.is_due(int(match[1])))

        for out in sorted(self._folder.glob("hf*")):
            if is_written(out.name):
                check_replaceable(out)
        if self._uploader is not None:
            self._uploader.check(is_written)

    def export_when_due(self, step: int, *, again: bool = True) -> None:
        """Write `hf-step-N/` if it is due. Rank 0 writes, the others wait.

        Args:
            again: replace an existing export. False after a resume, which only makes an export that was interrupted.

        Raises:
            UserError, RankFailure: it could not be written.
        """
        if self.is_due(step):
            self._checkpointer.wait()
            run_on_main(partial(self._export, step, again), self._group)

    def _export(self, step: int, again: bool) -> None:
        out = self._folder / f"hf-step-{step}"
        if again or not out.exists():
            convert(self._checkpointer.folder / f"step-{step}", out, self._options.export_dtype)
            if self._uploader is not None:
                self._uploader.add(out.name)
