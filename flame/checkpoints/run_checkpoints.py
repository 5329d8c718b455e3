"""When a run saves, and how it goes on from what it has saved."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flame.checkpoints.checkpoint import Checkpointer, list_checkpoints
from flame.checkpoints.checkpoint_agreement import run_on_main
from flame.checkpoints.checkpoint_files import list_run_checkpoints
from flame.checkpoints.resume_check import (
    check_made_by_run,
    check_model,
    check_resumable,
    check_sources,
    check_tokenizer,
    list_changes,
)
from flame.checkpoints.run_state import RunState
from flame.config import JobConfig
from flame.errors import UserError

logger = logging.getLogger("flame")


class RunCheckpoints:
    """The checkpoints of one run as `[checkpoint]` wants them. All ranks call each method at the same point of the run.

    Args:
        state: saved with the tensors of `checkpointer`, and loaded in place.
        fingerprint: the tokenizer's.
        source_names: of the mixture, in order.
    """

    def __init__(self, config: JobConfig, checkpointer: Checkpointer, state: RunState, fingerprint: str, source_names: list[str]):
        self._config, self._checkpointer, self._state = config, checkpointer, state
        self._fingerprint, self._source_names = fingerprint, source_names
        self._model_config = checkpointer.model.lm.config
        self.saved_step = 0
        """Step of the newest checkpoint, be it still being written; 0 without one."""

    def is_due(self) -> bool:
        """Every `checkpoint.interval` steps and at the end."""
        checkpoint, step = self._config.checkpoint, self._state.step
        return checkpoint.enable_checkpoint and (step % checkpoint.interval == 0 or step == self._config.training.steps)

    def is_owed(self) -> bool:
        """Whether the step that has been done would be lost."""
        return self._config.checkpoint.enable_checkpoint and self._state.step > self.saved_step

    def save(self) -> None:
        """Write a checkpoint; see `Checkpointer.save`."""
        identity = {
            "config": dataclasses.asdict(self._config),
            "model_config": self._model_config.to_dict(),
            "tokenizer_fingerprint": self._fingerprint,
        }
        self._checkpointer.save(self._state.step, self._state.gather() | identity)
        self.saved_step = self._state.step

    def resume(self) -> bool:
        """Go on from the newest readable checkpoint, if there is one.

        Raises:
            UserError: there is one, but it is of another run, or ahead of `training.steps`, or in another folder of the run, or
                checkpoints are off.
        """
        config, folder = self._config, self._config.job.dump_folder
        saved = self._checkpointer.load_latest(self._check) if config.checkpoint.enable_checkpoint else None
        if saved is None:
            run_on_main(self._refuse_to_start_over)
            return False
        if saved["step"] > config.training.steps:
            raise UserError(
                f"training.steps = {config.training.steps}, but the run in {folder} is at step {saved['step']} already: "
                "raise it, or start a new run in another job.dump_folder"
            )
        self._state.load(saved)
        self.saved_step = self._state.step
        if dist.get_rank() == 0:
            for change in self._list_changes(saved):
                logger.warning("changed since the checkpoint: %s", change)
        return True

    def _refuse_to_start_over(self) -> None:
        config, checkpoint = self._config, self._config.checkpoint
        folder = Path(config.job.dump_folder)
        made = list_checkpoints(self._checkpointer.folder) or list_run_checkpoints(folder)
        if made:
            switch = f'folder = "{checkpoint.folder}"' if checkpoint.enable_checkpoint else "enable_checkpoint = false"
            raise UserError(
                f'job.dump_folder = "{folder}" holds a run with checkpoints in "{os.path.relpath(made[-1].parent, folder)}", but '
                f"checkpoint.{switch} would start over in it: set that back, or choose another job.dump_folder"
            )

    def prepare(self) -> None:
        """Make sure that the checkpoints to come can be written; see `Checkpointer.prepare`."""
        if self._config.checkpoint.enable_checkpoint and self._state.step < self._config.training.steps:
            self._checkpointer.prepare()

    def _check(self, saved: dict[str, Any]) -> None:
        check_made_by_run(saved, self._checkpointer.folder)
        check_resumable(saved["config"], self._config)
        check_model(saved["model_config"], self._model_config.to_dict())
        check_tokenizer(saved["tokenizer_fingerprint"], self._fingerprint)
        check_sources(list(saved["data"]["sources"]), self._source_names)

    def _list_changes(self, saved: dict[str, Any]) -> list[str]:
        changes = list_changes(saved["config"], self._config)
        new = [name for name in self._source_names if name not in saved["counters"]["tokens_by_source"]]
        changes += [f'source "{name}" is new and begins at its first document' for name in new]
        world_size = dist.get_world_size()
        if saved["world_size"] != world_size:
            changes.append(f"ranks: {saved['world_size']} -> {world_size}")
        return changes
