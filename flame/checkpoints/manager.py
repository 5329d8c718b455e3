"""Saving and resuming a run.

A checkpoint `step-N/` holds

- the tensors of model and optimizer and the random states of each rank, each under its own name, written as shards by
  torch.distributed.checkpoint;
- `hf/`: the Hugging Face configuration, tokenizer and generation settings, so that an export needs only this folder;
- `trainer.json`, written last: step, configuration, data position, counters, and size and digest of each other file.

It is written to `step-N.partial/` and renamed when every rank is done. So a folder with the final name was once complete. A
checkpoint that was damaged later is skipped. Hyper-parameters are not stored with the tensors; the configuration sets them.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from flame.checkpoints import random_state
from flame.checkpoints.background import Background
from flame.checkpoints.files import (
    advise_going_back,
    check_disk_space,
    check_written,
    commit,
    explain_write_error,
    find_missing,
    find_token,
    leave_token,
    list_checkpoints,
    list_folders,
    purge_before,
    remove_partial,
    set_aside,
    write_durably,
)
from flame.checkpoints.manifest import TRAINER_FILE, digest_files, has_digests, read_state, verify_files, warn_unverified
from flame.checkpoints.reading import check_finite, find_not_finite, run_unverified
from flame.checkpoints.staging import TensorTree
from flame.checkpoints.storage import TensorReader, TensorWriter, check_tensors, verify_tensors
from flame.errors import UserError
from flame.models.wrapper import TrainingModel
from flame.runtime.agreement import RankFailure, run_on_all, run_on_main
from flame.runtime.torchtitan import OptimizersContainer

__all__ = ["HF_FOLDER", "TRAINER_FILE", "Checkpointer", "list_checkpoints"]

T = TypeVar("T")

logger = logging.getLogger("flame")

HF_FOLDER = "hf"

# Disk space beyond the tensors' bytes: the index, the tokenizer, a header for each shard.
EXTRA_SHARE = 0.01
EXTRA_BYTES = 16 * 2**20

SLOWEST_SAVE = timedelta(hours=2)


class Checkpointer:
    """Checkpoints of one run. All ranks call each method at the same point of the run.

    Args:
        folder: parent of the `step-N/` folders.
        keep_latest_k: number of complete checkpoints to keep; 0 keeps all.
        write_assets: writes the content of `hf/` into a folder; called once, on rank 0, before the first save.
        asynchronous: continue training as soon as the tensors are copied to the host; a thread writes and commits them.
    """

    def __init__(
        self,
        folder: Path,
        model: TrainingModel,
        optimizer: OptimizersContainer,
        keep_latest_k: int,
        write_assets: Callable[[Path], None],
        *,
        asynchronous: bool,
    ):
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.keep_latest_k = keep_latest_k
        self.write_assets = write_assets
        # A separate group: the thread's collectives must not mix with those of training, and a slow disk needs a long timeout.
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST_SAVE)
        self._background = Background() if asynchronous else None
        self._has_failed = False
        self._assets: dict[str, bytes] = {}

    # ---------------------------------------------------------------- saving

    def save(self, step: int, trainer_state: dict[str, Any]) -> None:
        """Write and commit `step-{step}`, then delete old checkpoints.

        Tensors and state may be changed as soon as this returns. An asynchronous save is complete when `wait` has returned. If
        the asynchronous save before this one has failed, the error is logged and this one is still made.

        Args:
            trainer_state: JSON-serializable, the same on all ranks. `world_size` and `files` are added to it.

        Raises:
            UserError: the disk is full or read-only, or the weights are not finite.
            RankFailure: the checkpoint could not be written; if asynchronous, the last two could not.
        """
        self._finish_last_save()
        run_on_all(partial(self._refuse_not_finite, step))
        rank_state = {f"rank-{dist.get_rank():05d}.{name}": state for name, state in random_state.capture().items()}
        tensors = self._list_tensors() | {"rng": rank_state}
        run_on_main(partial(self._prepare, _count_bytes(tensors)))
        state = copy.deepcopy(trainer_state) | {"world_size": dist.get_world_size()}
        if self._background is None:
            self._write(step, tensors, state)
        else:
            self._background.start(self._write, step, self._background.staging.copy(tensors), state)

    def _refuse_not_finite(self, step: int) -> None:
        if name := find_not_finite(self.model):
            raise UserError(
                f"step {step}: there are weights that are not finite, first {name}: nothing is saved, since no step can mend them"
                f"{advise_going_back(self.folder)}"
            )

    def _finish_last_save(self) -> None:
        try:
            self.wait()
            self._has_failed = False
        except (UserError, RankFailure) as error:
            if self._has_failed:
                raise
            self._has_failed = True
            if dist.get_rank() == 0:
                logger.error("%s; trying again with this one", error)

    def wait(self) -> None:
        """Wait until the last save is committed on all ranks.

        Raises:
            UserError, RankFailure: it has failed; raised once, on all ranks.
        """
        if self._background is not None:
            self._background.wait()

    def close(self) -> None:
        """Finish a running save and end the thread. An error of that save is logged."""
        if self._background is not None:
            self._background.close()

    def prepare(self) -> None:
        """Check, before training, that checkpoints can be written. Deletes what interrupted saves have left.

        Raises:
            UserError: the folder cannot be written, is not the same for all ranks, or the next checkpoint will not fit.
        """
        self.wait()
        token = run_on_main(partial(leave_token, self.folder))
        try:
            run_on_all(partial(find_token, self.folder, token, dist.get_rank()))
        finally:
            (self.folder / token).unlink(missing_ok=True)
        run_on_main(partial(self._prepare, _count_bytes(self._list_tensors())))

    def _prepare(self, size: int) -> None:
        self._check_disk_space(size)
        if not self._assets:  # in the training's thread, since a tokenizer must not be used by two threads
            with tempfile.TemporaryDirectory() as name:
                self.write_assets(Path(name))
                self._assets = {str(p.relative_to(name)): p.read_bytes() for p in Path(name).rglob("*") if p.is_file()}

    def _check_disk_space(self, size: int) -> None:
        remove_partial(self.folder)  # safe, since no save is running
        check_disk_space(self.folder, size + int(size * EXTRA_SHARE) + EXTRA_BYTES, self.keep_latest_k)

    def _write(self, step: int, tensors: TensorTree, state: dict[str, Any]) -> None:
        """Write and commit. If saves are asynchronous, the thread runs this."""
        unfinished = self.folder / f"step-{step}.partial"
        try:
            own = run_on_all(partial(self._explain, partial(self._write_tensors, unfinished, tensors)), self._group)
            digests = self._gather_digests(own)
            run_on_main(partial(self._explain, partial(self._commit, unfinished, state, digests)), self._group)
        except (UserError, RankFailure) as error:
            if dist.get_rank() == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, RankFailure):
                line = f'checkpoint "{self.folder / f"step-{step}"}" was not saved: {error}'
                raise RankFailure(line, is_of_machine=error.is_of_machine) from error
            raise

    def _write_tensors(self, folder: Path, tensors: TensorTree) -> dict[str, str]:
        """Write this rank's shards. Returns their digests by name, of what can be read back."""
        # Copying ahead is for tensors on a GPU, and would wait for the training's kernels.
        writer = TensorWriter(folder) if self._background is None else TensorWriter(folder, per_thread_copy_ahead=0)
        dcp.save(tensors, storage_writer=writer, process_group=self._group)
        return digest_files(folder, writer.written)

    def _gather_digests(self, own: dict[str, str]) -> dict[str, str]:
        of_ranks: list[dict[str, str] | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(of_ranks, own, group=self._group)
        return {name: digest for digests in of_ranks if digests is not None for name, digest in digests.items()}

    def _commit(self, unfinished: Path, state: dict[str, Any], digests: dict[str, str]) -> None:
        check_written(unfinished, TensorReader(unfinished).read_metadata())
        for name, content in self._assets.items():
            write_durably(unfinished / HF_FOLDER / name, content)
        final = unfinished.with_suffix("")
        commit(unfinished, final, state, digests)
        purge_before(final, self.keep_latest_k)

    def _explain(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except (OSError, dcp.CheckpointException) as error:
            if mistake := explain_write_error(error, self.folder, self.keep_latest_k):
                raise mistake from error
            raise

    # ---------------------------------------------------------------- resuming

    def load_latest(self, check: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """Load the newest readable checkpoint into model and optimizer. On the same number of ranks, restore random states too.

        A damaged checkpoint is skipped with a warning, and the one before it is used. Then the damaged one is renamed to
        `step-N.damaged`, so that no later start uses it. Checkpoints beyond `keep_latest_k` are deleted.

        Args:
            check: raises a UserError if the run cannot continue from this trainer state; called on all ranks.

        Returns:
            the trainer state of the checkpoint, or None if there is no checkpoint.

        Raises:
            UserError: from `check`, or there are checkpoints but none can be read.
            RankFailure: the machine failed, not the checkpoint.
        """
        self.wait()
        complete, damaged = run_on_main(self._survey)
        passed = damaged
        for checkpoint in reversed(complete):
            try:
                state = self._load_whole(checkpoint, check)
            except RankFailure as failure:
                if not failure.is_damage:
                    raise
                if dist.get_rank() == 0:
                    logger.warning("checkpoint %s cannot be read and is passed over: %s", checkpoint, failure)
                passed = [*passed, checkpoint]
                continue
            run_on_main(partial(self._tidy, checkpoint, passed))
            return state
        if complete or damaged:
            total = len(complete) + len(damaged)
            raise UserError(f'none of the {total} checkpoints in "{self.folder}" can be read: move them away to start over')
        return None

    def load_one(self, checkpoint: Path, check: Callable[[dict[str, Any]], None], option: str) -> dict[str, Any]:
        """Load this checkpoint, of this run or another, and no other; like `load_latest`.

        Args:
            option: what names it, for the error line.

        Raises:
            UserError: from `check`, or it cannot be read.
        """
        try:
            return self._load_whole(checkpoint, check)
        except RankFailure as failure:
            if not failure.is_damage:
                raise
            raise UserError(f'{option}: "{checkpoint}" cannot be read: {failure}: name another') from failure

    def _load_whole(self, checkpoint: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        state = run_on_main(partial(read_state, checkpoint))
        is_verified = has_digests(state)
        run = run_on_all if is_verified else run_unverified
        run(partial(check, state))
        if is_verified:
            run(partial(verify_files, checkpoint, state, dist.get_rank(), dist.get_world_size()))
        elif dist.get_rank() == 0:
            warn_unverified(checkpoint)
        self._load(checkpoint, state, run)
        run_on_all(partial(check_finite, self.model))
        return state

    def _tidy(self, used: Path, passed: list[Path]) -> None:
        for damaged in passed:
            logger.warning("checkpoint %s is set aside as %s", damaged, set_aside(damaged).name)
        purge_before(used, self.keep_latest_k)

    def _survey(self) -> tuple[list[Path], list[Path]]:
        """Complete and incomplete checkpoints, oldest first."""
        complete: list[Path] = []
        damaged: list[Path] = []
        for checkpoint in list_folders(self.folder):
            missing = find_missing(checkpoint)
            (damaged if missing else complete).append(checkpoint)
            if missing:
                logger.warning("checkpoint %s is incomplete, without %s, and is passed over", checkpoint, " and ".join(missing))
        return complete, damaged

    def _load(self, checkpoint: Path, state: dict[str, Any], run: Callable[[Callable[[], Any]], Any]) -> None:
        """Load the tensors of a checkpoint.

        Args:
            run: runs an action on all ranks.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        reader = TensorReader(checkpoint)
        metadata = run(reader.read_metadata)
        tensors = self._list_tensors()
        own = f"rng.rank-{rank:05d}."
        states = {
            key.removeprefix(own): torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(own) and state["world_size"] == world_size
        }
        if states:  # the library would read an empty dictionary as an entry of its own
            tensors["rng"] = {f"rank-{rank:05d}.{name}": each for name, each in states.items()}
        run(partial(check_tensors, metadata, tensors))
        if not has_digests(state):
            run(partial(verify_tensors, checkpoint, metadata, rank, world_size))
        run(partial(dcp.load, tensors, storage_reader=reader))
        run(partial(random_state.restore, states))

    def _list_tensors(self) -> TensorTree:
        """The tensors in use, without copies: saving reads them, loading writes into them."""
        optimizer = {key: value for key, value in self.optimizer.state_dict().items() if isinstance(value, torch.Tensor)}
        return {"model": cast(dict[str, torch.Tensor], get_model_state_dict(self.model)), "optimizer": optimizer}


def _count_bytes(tensors: TensorTree) -> int:
    """Total size of all tensors over all ranks, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for named in tensors.values() for tensor in named.values())
