"""Saving and resuming a run.

A checkpoint `step-N/` holds

- the tensors of model and optimizer, written by torch.distributed.checkpoint, sharded, each under its own name;
- `trainer.json`: step, data cursors and counters, readable by anyone;
- `hf/`: the Hugging Face configuration and tokenizer, so that the folder alone suffices for an export.

It is written aside as `step-N.partial/` and renamed when every rank is done: a folder with the final name was complete once. One
that has been damaged since is passed over.
Hyper-parameters are not stored with the tensors: those of the configuration hold.
"""

from __future__ import annotations

import dataclasses
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
from flame.config import JobConfig
from flame.errors import UserError
from flame.models.future_lm import FutureLM

logger = logging.getLogger("flame")

# Options that decide which tensors there are and what the data cursors mean.
FIXED_OPTIONS = (
    ("model", "config"),
    ("model", "tokenizer_path"),
    ("training", "dataset"),
    ("training", "dataset_name"),
    ("training", "dataset_split"),
    ("training", "data_files"),
    ("training", "text_column"),
    ("training", "num_streams"),
    ("training", "seed"),
    ("future_encoder", "estimator_type"),
    ("future_encoder", "learnable_temperature"),
    ("future_predictor", "head_type"),
    ("experimental", "freeze_lm_for_infonce"),
)

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

    def load_latest(self, check: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """Load the newest readable checkpoint into model and optimizer; all ranks call it.

        A damaged one is passed over with a warning: the one before it is used.

        Args:
            check: raises a UserError if the run with this saved configuration cannot be gone on with.

        Returns:
            its trainer state, or None where there is no checkpoint.

        Raises:
            UserError: from `check`, or there are checkpoints but none can be read.
        """
        complete = list_checkpoints(self.folder)
        for folder in reversed(complete):
            try:
                state = json.loads((folder / TRAINER_FILE).read_text())
                check(state["config"])
                dcp.load(self._tensors(), checkpoint_id=folder)
                return state
            except (OSError, ValueError, KeyError, RuntimeError, dcp.CheckpointException) as error:
                reason = next(reversed(str(error).splitlines()), "")[:200]  # the library puts a traceback before it
                logger.warning("checkpoint %s cannot be read and is passed over: %s %s", folder, type(error).__name__, reason)
        if complete:
            raise UserError(
                f'none of the {len(complete)} checkpoints in "{self.folder}" can be read: move them away to start over'
            )
        return None

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


def check_resumable(saved: dict[str, dict[str, Any]], config: JobConfig) -> None:
    """Refuse to go on with a run under options that would make it another one.

    Args:
        saved: the configuration in the checkpoint, by section.

    Raises:
        UserError: one line for each option that has changed.
    """
    now = dataclasses.asdict(config)
    changed = [
        f"{section}.{key} = {json.dumps(now[section][key])}, but the run in {config.job.dump_folder} was made with "
        f"{json.dumps(saved[section][key])}: set it back, or start a new run in another job.dump_folder"
        for section, key in FIXED_OPTIONS
        if now[section][key] != saved[section][key]
    ]
    before, after = saved["future_encoder"], now["future_encoder"]
    if (before["enable"] and before["loss_weight"] > 0) != config.uses_future:
        changed.append(
            f"future_encoder.enable = {json.dumps(after['enable'])} with loss_weight = {after['loss_weight']}, but the run in "
            f"{config.job.dump_folder} was made with {json.dumps(before['enable'])} and {before['loss_weight']}: one has a "
            "predictor, the other has not; set it back, or start a new run in another job.dump_folder"
        )
    if changed:
        raise UserError(*changed)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = {int(match[1]): path for path in folder.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))}
    return [
        steps[step] for step in sorted(steps) if (steps[step] / ".metadata").exists() and (steps[step] / TRAINER_FILE).exists()
    ]
