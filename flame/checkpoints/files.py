"""Files and folders of checkpoints: listing them, checking free disk space, and changes that survive a power cut."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from flame.checkpoints.manifest import TRAINER_FILE, describe_files, render
from flame.checkpoints.storage import METADATA_FILE, find_os_error
from flame.errors import UserError
from flame.runtime.disk import CLOSED, FULL, replace

logger = logging.getLogger("flame")

GIB = 2**30


def list_folders(folder: Path) -> list[Path]:
    """All folders with the name of a checkpoint, oldest first, including damaged ones."""
    steps = {int(match[1]): path for path in folder.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))}
    return [steps[step] for step in sorted(steps)]


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [path for path in list_folders(folder) if not find_missing(path)]


def find_missing(checkpoint: Path) -> list[str]:
    """Names of the required files that a checkpoint lacks; empty if it is complete."""
    return [name for name in (METADATA_FILE, TRAINER_FILE) if not (checkpoint / name).is_file()]


def check_written(partial: Path, metadata: Metadata) -> None:
    """Check that all files in the index exist. Files of other machines are missing if the folder is not shared.

    Raises:
        OSError: a file is missing or too short.
    """
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        if not (partial / name).exists() or (partial / name).stat().st_size < end:
            raise OSError(f"{name} is missing or too short: is {partial.parent} one folder for all machines?")


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint that cannot be used to `step-N.damaged`, without deleting it. Returns the new path."""
    renamed = checkpoint.with_name(f"{checkpoint.name}.damaged")
    _delete(renamed)
    replace(checkpoint, renamed)
    return renamed


def commit(partial: Path, final: Path, state: dict[str, Any], digests: dict[str, str] | None = None) -> None:
    """Add `trainer.json` to a folder and rename it to its final name. After a power cut, all of it is there or nothing.

    Args:
        partial: the folder; its tensors are on the disk already.
        final: the final path; an existing checkpoint there is replaced.
        state: JSON-serializable. Sizes and digests of all files are added.
        digests: of files, by name, by those who wrote them; the others are read.
    """
    write_durably(partial / TRAINER_FILE, render(state | describe_files(partial, digests or {})))
    for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync_to_disk(folder)
    if final.exists():
        remove(final)
    replace(partial, final)
    sync_to_disk(final.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file, create its folder if needed, and wait until the file is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    sync_to_disk(path)


def sync_to_disk(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that an interrupted deletion leaves nothing that looks complete."""
    renamed = checkpoint.with_name(f"{checkpoint.name}.old.partial")
    _delete(renamed)
    replace(checkpoint, renamed)
    if renamed.is_dir() and not renamed.is_symlink():
        shutil.rmtree(renamed)
    else:
        renamed.unlink()


def remove_partial(folder: Path) -> None:
    """Delete what interrupted saves and deletions have left."""
    for leftover in folder.glob("step-*.partial"):
        _delete(leftover)


def _delete(path: Path) -> None:
    """Delete a folder, a file or a link, as far as possible."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def was_skipping(checkpoint: Path) -> bool:
    """Whether steps were being skipped when a checkpoint was made. Its weights are finite, but may be past saving."""
    try:
        counters = json.loads((checkpoint / TRAINER_FILE).read_text())["counters"]
        return bool(counters["skipped_in_a_row"] or counters["skipped_aux_in_a_row"])
    except (OSError, ValueError, LookupError, TypeError):
        return False  # unreadable, or of no run


def list_good_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints that were not made while steps were being skipped, newest first."""
    return [int(path.name.removeprefix("step-")) for path in reversed(list_checkpoints(folder)) if not was_skipping(path)]


def advise_going_back(folder: Path) -> str:
    """How to go back, to follow an error line; empty if there is no checkpoint to go back to."""
    steps = list_good_steps(folder)
    if not steps:
        return ""
    otherwise = f" (or {steps[1]}, if that fails too)" if len(steps) > 1 else ""
    return f"; put the cause right and go back to before them with --checkpoint.load_step {steps[0]}{otherwise}"


def purge_before(newest: Path, keep_latest_k: int) -> None:
    """Delete the oldest checkpoints, so that `keep_latest_k` up to and including `newest` remain; 0 keeps all.

    Checkpoints made while steps were being skipped push out no good one: of those only `newest` remains. Later checkpoints, which
    the run has skipped as damaged, do not count.
    """
    if not keep_latest_k:
        return
    complete = list_checkpoints(newest.parent)
    candidates = complete[: complete.index(newest) + 1]
    kept = {newest, *[path for path in candidates if not was_skipping(path)][-keep_latest_k:]}
    for old in (path for path in candidates if path not in kept):
        try:
            remove(old)
        except OSError as error:  # not fatal: the new checkpoint is complete
            logger.warning("old checkpoint %s cannot be removed: %s", old, error)


def leave_token(folder: Path) -> str:
    """Make a file of a new name in a folder, which is created if needed. Returns the name.

    Raises:
        UserError: the folder cannot be written to.
    """
    token = f".shared-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch()
    except OSError as error:
        raise UserError(f'job.dump_folder: "{folder}" cannot be written to ({error.strerror})') from error
    return token


def find_token(folder: Path, token: str, rank: int) -> None:
    """Check that a rank sees the file that rank 0 has made.

    Raises:
        UserError: it does not.
    """
    if not (folder / token).exists():
        raise UserError(
            f'job.dump_folder: "{folder}" is not the same folder for rank {rank} as for rank 0: '
            "job.dump_folder must be on a disk that all machines share"
        )


def check_disk_space(folder: Path, needed: int, keep_latest_k: int) -> None:
    """Check that the next checkpoint fits on the disk.

    Args:
        needed: bytes.

    Raises:
        UserError: it does not fit.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    total, _, free = shutil.disk_usage(existing)
    if total and free < needed:  # some file systems report a total of 0
        raise UserError(
            f'job.dump_folder: "{folder}" needs {needed / GIB:.2f} GiB for the next checkpoint, but {free / GIB:.2f} GiB are '
            f"free: {advise_on_full_disk(keep_latest_k)}"
        )


def explain_write_error(error: BaseException, folder: Path, keep_latest_k: int) -> UserError | None:
    """The line for a disk that is full or may not be written to; None for another error."""
    found = find_os_error(error)
    if found is None or found.errno not in (*FULL, *CLOSED):
        return None
    if found.errno in CLOSED:
        return UserError(f'job.dump_folder: "{folder}" cannot be written to ({found.strerror}): make it writable')
    return UserError(f'job.dump_folder: the disk of "{folder}" is full: {advise_on_full_disk(keep_latest_k)}')


def advise_on_full_disk(keep_latest_k: int) -> str:
    """Advice on a full disk, for error lines."""
    if keep_latest_k == 0:
        lower = ", or set checkpoint.keep_latest_k = 0, which keeps all, to a number"
    else:
        lower = f", or lower checkpoint.keep_latest_k = {keep_latest_k}" if keep_latest_k > 1 else ""
    return f"free space (older step-N folders may go){lower}; the newest checkpoint is untouched"
