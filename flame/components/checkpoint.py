"""Saving and resuming a run.

A checkpoint `step-N/` holds

- the tensors of model and optimizer, written by torch.distributed.checkpoint, sharded, each under its own name;
- `trainer.json`: step, data cursors and counters, readable by anyone;
- `hf/`: the Hugging Face configuration and tokenizer, so that the folder alone suffices for an export.

It is written aside as `step-N.partial/` and renamed when every rank is done: a folder with the final name is complete.
Hyper-parameters are not stored with the tensors: those of the configuration hold.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from flame.components.titan import OptimizersContainer
from flame.models.future_lm import FutureLM

logger = logging.getLogger("flame")

TRAINER_FILE = "trainer.json"
HF_FOLDER = "hf"


class Checkpointer:
    """Checkpoints of one run.

    Args:
        folder: where `step-N/` folders live.
        keep_latest_k: complete checkpoints to keep; 0 keeps all.
        write_assets: writes the Hugging Face configuration and tokenizer into a folder; called on rank 0.
    """

    def __init__(
        self,
        folder: Path,
        model: FutureLM,
        optimizer: OptimizersContainer,
        keep_latest_k: int,
        write_assets: Callable[[Path], None],
    ):
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.keep_latest_k = keep_latest_k
        self.write_assets = write_assets

    def save(self, step: int, trainer_state: dict[str, Any]) -> Path:
        """Write and commit `step-{step}`; all ranks call it. Older checkpoints are purged only after the commit.

        Args:
            trainer_state: JSON-able, the same on all ranks.

        Returns:
            the committed folder.
        """
        final = self.folder / f"step-{step}"
        partial = self.folder / f"step-{step}.partial"
        is_main = dist.get_rank() == 0
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / TRAINER_FILE).write_text(json.dumps(trainer_state, indent=1))
            self.write_assets(partial / HF_FOLDER)
        dist.barrier()
        dcp.save(self._tensors(), checkpoint_id=partial)
        if is_main:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            self._purge()
        dist.barrier()
        return final

    def load_latest(self) -> dict[str, Any] | None:
        """Load the newest complete checkpoint into model and optimizer; all ranks call it.

        Returns:
            its trainer state, or None where there is none.
        """
        complete = list_checkpoints(self.folder)
        if not complete:
            return None
        newest = complete[-1]
        dcp.load(self._tensors(), checkpoint_id=newest)
        return json.loads((newest / TRAINER_FILE).read_text())

    def _tensors(self) -> dict[str, Any]:
        """The live tensors: saving reads them, loading writes into them."""
        optimizer = {key: value for key, value in self.optimizer.state_dict().items() if isinstance(value, torch.Tensor)}
        return {"model": get_model_state_dict(self.model), "optimizer": optimizer}

    def _purge(self) -> None:
        if self.keep_latest_k:
            for old in list_checkpoints(self.folder)[: -self.keep_latest_k]:
                shutil.rmtree(old)
        for torn in self.folder.glob("step-*.partial"):
            shutil.rmtree(torn, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = {int(match[1]): path for path in folder.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))}
    return [
        steps[step] for step in sorted(steps) if (steps[step] / ".metadata").exists() and (steps[step] / TRAINER_FILE).exists()
    ]
