"""Files and folders of checkpoints: which there are, room for the next one, and changes that survive a power cut."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from flame.checkpoints.checkpoint_storage import METADATA_FILE
from flame.errors import UserError

logger = logging.getLogger("flame")

TRAINER_FILE = "trainer.json"
GIB = 2**30


def list_folders(folder: Path) -> list[Path]:
    """All folders with the name of a checkpoint, oldest first; damaged ones too."""
    steps = {int(match[1]): path for path in folder.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))}
    return [steps[step] for step in sorted(steps)]


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [path for path in list_folders(folder) if not find_missing(path)]


def list_run_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints that the run in a folder has made, oldest first, in whatever `checkpoint.folder` down to two deep.

    What lies there for another purpose does not count: a converted model, checkpoints of another run or moved out of the way.
    """
    # Not `**`, which goes through all that lies beside, and round in links.
    folders = {path.parent for depth in ("", "*/", "*/*/") for path in run.glob(f"{depth}step-*")}
    made = [checkpoint for folder in folders for checkpoint in list_checkpoints(folder) if _is_made_in(run, checkpoint)]
    return sorted(made, key=lambda checkpoint: int(checkpoint.name.removeprefix("step-")))


def _is_made_in(run: Path, checkpoint: Path) -> bool:
    try:
        config = read_state(checkpoint)["config"]
    except (OSError, ValueError):
        return False
    return bool(config) and os.path.abspath(run / config["checkpoint"]["folder"]) == os.path.abspath(checkpoint.parent)


def find_missing(checkpoint: Path) -> list[str]:
    """Names of the files that a complete checkpoint has and this one lacks."""
    return [name for name in (METADATA_FILE, TRAINER_FILE) if not (checkpoint / name).exists()]


def check_written(partial: Path, metadata: Metadata) -> None:
    """Make sure that what the index lists is there: another machine's files are missing where the folder is not shared.

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
    """Take a checkpoint that cannot be used out of the row, without removing it."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    return aside


def commit(partial: Path, final: Path, state: dict[str, Any]) -> None:
    """Complete a folder with `trainer.json` and give it its final name, such that a power cut leaves all of it or nothing.

    Args:
        partial: the folder; its tensors are on the disk already.
        state: JSON-able. The sizes of all files, in bytes, are added as `files`.
    """
    files = {str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()}
    write_durably(partial / TRAINER_FILE, json.dumps(state | {"files": files}, indent=1).encode())
    for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync_to_disk(folder)
    if final.exists():
        remove(final)
    os.replace(partial, final)
    sync_to_disk(final.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file, its folder included, and wait until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    sync_to_disk(path)


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It loses its name first: a removal cut short leaves none that looks complete."""
    aside = checkpoint.with_name(f"{checkpoint.name}.old.partial")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    shutil.rmtree(aside)


def remove_partial(folder: Path) -> None:
    """Remove what unfinished saves and removals have left."""
    for torn in folder.glob("step-*.partial"):
        shutil.rmtree(torn, ignore_errors=True)


def purge_before(newest: Path, keep_latest_k: int) -> None:
    """Remove checkpoints older than a committed one, so that `keep_latest_k` are left with it; 0 keeps all.

    Later ones, which the run has passed over for damage, do not count.
    """
    if not keep_latest_k:
        return
    complete = list_checkpoints(newest.parent)
    for old in complete[: max(complete.index(newest) + 1 - keep_latest_k, 0)]:
        try:
            remove(old)
        except OSError as error:  # the new one is safe all the same
            logger.warning("old checkpoint %s cannot be removed: %s", old, error)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read `trainer.json`, and make sure that every file it lists is there in its size.

    Raises:
        OSError: a file is missing or has another size.
        ValueError: `trainer.json` is torn or is no list of files.
    """
    try:
        state = json.loads((checkpoint / TRAINER_FILE).read_text())
    except ValueError as error:
        raise ValueError(f"{TRAINER_FILE}: {error}") from error
    if not isinstance(state, dict) or not {"config", "files", "world_size"} <= state.keys():
        raise ValueError(f"{TRAINER_FILE} lacks the configuration, the number of ranks or the list of files")
    for name, size in state["files"].items():
        found = (checkpoint / name).stat().st_size
        if found != size:
            raise OSError(f"{name} has {found} bytes instead of {size}")
    return state


def check_room(folder: Path, needed: int, keep_latest_k: int) -> None:
    """Make sure that the next checkpoint fits on the disk.

    Args:
        needed: bytes.

    Raises:
        UserError: it does not.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    total, _, free = shutil.disk_usage(existing)
    if total and free < needed:  # some file systems do not say
        raise UserError(
            f'checkpoint.folder: "{folder}" needs {needed / GIB:.2f} GiB for the next checkpoint, but {free / GIB:.2f} GiB are '
            f"free: {advise(keep_latest_k)}"
        )


def advise(keep_latest_k: int) -> str:
    """What to do about a full disk."""
    if keep_latest_k == 0:
        lower = ", or set checkpoint.keep_latest_k = 0, which keeps all, to a number"
    else:
        lower = f", or lower checkpoint.keep_latest_k = {keep_latest_k}" if keep_latest_k > 1 else ""
    return f"free space (older step-N folders may go){lower}; the newest checkpoint is untouched"
