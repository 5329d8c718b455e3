"""When a run saves a checkpoint, and how it resumes from one."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from flame.checkpoints.going_back import find_return, go_back
from flame.checkpoints.jumps import describe_jump
from flame.checkpoints.manager import Checkpointer, list_checkpoints
from flame.checkpoints.resume import (
    FORMAT,
    check_made_by_run,
    check_model,
    check_resumable,
    check_tokenizer,
    list_changes,
    list_used_sections,
)
from flame.checkpoints.sources import match_sources, rename_sources
from flame.checkpoints.state import RunState
from flame.config.run import NEXT_TOKEN, STARTS_FILE
from flame.config.schema import JobConfig
from flame.data.corpus_content import describe_contents
from flame.data.encoding import fingerprint_tokenizer
from flame.data.mixture import Mixture
from flame.errors import UserError
from flame.objectives.step import get_objective
from flame.runtime.agreement import run_on_main

logger = logging.getLogger("flame")


class _Found(NamedTuple):
    """What a run goes on from, which has been loaded."""

    saved: dict[str, Any]
    """`trainer.json`."""
    label: str
    """For error lines."""
    goes_back: bool = False
    """It is `checkpoint.load_step`."""
    is_branch: bool = False
    """It is of another run."""


class RunCheckpoints:
    """The checkpoints of one run, by the options in `[checkpoint]`. All ranks call each method at the same point of the run.

    Args:
        state: saved with the tensors of `checkpointer`, and loaded in place.
        mixture: of the training data.
    """

    def __init__(
        self, config: JobConfig, checkpointer: Checkpointer, state: RunState, tokenizer: PreTrainedTokenizerFast, mixture: Mixture
    ):
        self._config, self._checkpointer, self._state = config, checkpointer, state
        self._fingerprint, self._mixture = fingerprint_tokenizer(tokenizer), mixture
        self._model_config = checkpointer.model.lm.config
        self._objective = get_objective(checkpointer.model)
        self.saved_step = 0
        """Step of the newest checkpoint, even if it is still being written; 0 if there is none."""

    def is_due(self) -> bool:
        """Whether to save after this step: every `checkpoint.interval` steps, and at the last step."""
        checkpoint, step = self._config.checkpoint, self._state.step
        return checkpoint.enable_checkpoint and (step % checkpoint.interval == 0 or step == self._config.training.steps)

    def is_owed(self) -> bool:
        """Whether there are steps that no checkpoint has yet."""
        return self._config.checkpoint.enable_checkpoint and self._state.step > self.saved_step

    def save(self) -> None:
        """Write a checkpoint; see `Checkpointer.save`."""
        objective = self._objective
        identity = {
            "format": FORMAT,
            "config": self._config.to_dict(),
            "model_config": self._model_config.to_dict(),
            "tokenizer_fingerprint": self._fingerprint,
            "objective": None
            if objective is None
            else {
                "name": objective.name,
                "exported": list(objective.list_exported()),
                "task": objective.describe_task()._asdict(),
                "description": objective.describe_training(),
                "modules": objective.describe_modules(),
            },
        }
        self._checkpointer.save(self._state.step, self._state.gather() | identity)
        self.saved_step = self._state.step

    def resume(self) -> bool:
        """Go on from the newest readable checkpoint, or from `checkpoint.load_step` or `branch_from`. False if there is none.

        Raises:
            UserError: there is one, but it is of another run, or ahead of `training.steps`, or checkpoints are off.
        """
        config = self._config
        if not config.checkpoint.enable_checkpoint:
            run_on_main(self._refuse_to_start_over)
            if not config.checkpoint.branch_from:
                return False
        self._state.data.contents = run_on_main(partial(describe_contents, config, self._mixture))
        found = self._load()
        if found is None:
            return False
        saved = found.saved
        if saved["step"] + found.is_branch > config.training.steps:
            raise UserError(
                f"training.steps = {config.training.steps}, but {found.label} is at step {saved['step']} already: raise it, or "
                "start a new run in another job.dump_folder"
            )
        if found.goes_back:
            run_on_main(partial(go_back, config, saved["step"]))
        changes = self._list_changes(saved)
        self._state.load(saved)
        self.saved_step = 0 if found.is_branch else self._state.step
        if found.is_branch or not run_on_main((Path(config.job.dump_folder) / STARTS_FILE).exists):
            self._state.service_ids = {}  # of the run whose checkpoint it was, which goes on under them
        if dist.get_rank() == 0:
            if found.is_branch:
                logger.info("a branch of %s, from step %d on", found.label, self._state.step)
            for change in changes:
                logger.warning("changed since the checkpoint: %s", change)
            weights = config.checkpoint.initial_load_path
            if weights and weights != saved["config"]["checkpoint"].get("initial_load_path"):
                logger.warning(
                    'checkpoint.initial_load_path = "%s" has no effect: the weights are those of %s; for a new run set another '
                    "job.dump_folder",
                    weights,
                    found.label,
                )
            if jump := describe_jump(saved["config"], config, self._state.step):
                logger.warning("the schedule jumps: %s", jump)
        return True

    def _load(self) -> _Found | None:
        """Load what the run goes on from into model and optimizer; None for a new run."""
        options, own = self._config.checkpoint, f"the run in {self._config.job.dump_folder}"
        check = partial(self._check, self._checkpointer.folder, own)
        if options.enable_checkpoint:
            step = run_on_main(partial(find_return, self._config))
            if step is not None:
                checkpoint = self._checkpointer.folder / f"step-{step}"
                saved = self._checkpointer.load_one(checkpoint, check, f"checkpoint.load_step = {step}")
                return _Found(saved, own, goes_back=True)
            newest = self._checkpointer.load_latest(check)
            if newest is not None:
                return _Found(newest, own)
        branch = self._config.branch_folder
        if branch is None:
            return None
        label = f'checkpoint.branch_from = "{options.branch_from}"'
        check = partial(self._check, branch.parent, label)
        return _Found(self._checkpointer.load_one(branch, check, "checkpoint.branch_from"), label, is_branch=True)

    def _refuse_to_start_over(self) -> None:
        """Reject a start without checkpoints in a folder that has some: it would overwrite the records of that run."""
        folder = self._config.job.dump_folder
        if list_checkpoints(self._checkpointer.folder):
            raise UserError(
                f'job.dump_folder = "{folder}" holds a run with checkpoints, but checkpoint.enable_checkpoint = false would '
                "start over in it: set that back, or choose another job.dump_folder"
            )

    def prepare(self) -> None:
        """Check that checkpoints can be written; see `Checkpointer.prepare`."""
        if self._config.checkpoint.enable_checkpoint and self._state.step < self._config.training.steps:
            self._checkpointer.prepare()

    def _check(self, folder: Path, label: str, saved: dict[str, Any]) -> None:
        """Check that the run may go on from a checkpoint in this folder of checkpoints."""
        check_made_by_run(saved, folder)
        saved_objective = saved["objective"]["name"] if saved["objective"] else NEXT_TOKEN
        own = self._objective.name if self._objective is not None else NEXT_TOKEN
        check_resumable(saved["config"], saved_objective, self._config, own, list_used_sections(self._config), label)
        check_model(saved["model_config"], self._model_config.to_dict())
        check_tokenizer(saved["tokenizer_fingerprint"], self._fingerprint)
        match_sources(saved, self._config, self._state.data.contents)

    def _list_changes(self, saved: dict[str, Any]) -> list[str]:
        """What has changed since the checkpoint. Sources of the checkpoint get their new names in it."""
        changes = list_changes(saved["config"], self._config)
        names = match_sources(saved, self._config, self._state.data.contents)
        changes += [f'source "{old}" is called "{new}" and goes on where it was' for old, new in names.items() if old != new]
        rename_sources(saved, names)
        new = [name for name in self._state.data.contents if name not in saved["counters"]["tokens_by_source"]]
        changes += [f'source "{name}" is new and begins at its first document' for name in new]
        world_size = dist.get_world_size()
        if saved["world_size"] != world_size:
            changes.append(f"ranks: {saved['world_size']} -> {world_size}")
        return changes
