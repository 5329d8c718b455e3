"""Going back to an earlier step of a run, `checkpoint.load_step`. Rank 0 calls these functions.

What is newer than the step is renamed and kept. A note in the run's folder says that it was done: a scheduler that repeats the
command does not go back again.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

from flame.checkpoints.files import list_checkpoints, list_folders, sync_to_disk, write_durably
from flame.config.schema import JobConfig
from flame.errors import UserError
from flame.logging.writers.json_lines import METRICS_FILE
from flame.runtime.disk import replace

NOTE_FILE = "load_step.json"
EXPORTS = "hf*"

logger = logging.getLogger("flame")


def find_wanted_step(config: JobConfig) -> int | None:
    """The step to go back to; None if it is not asked for, or has been done."""
    step, note = config.checkpoint.load_step, Path(config.job.dump_folder) / NOTE_FILE
    return None if step is None or _read_note(note, step) else step


def find_return(config: JobConfig) -> int | None:
    """The step to go back to; None if it is not asked for, or has been done. A start without the option forgets what was done.

    Raises:
        UserError: there is no such checkpoint.
    """
    step, note = config.checkpoint.load_step, Path(config.job.dump_folder) / NOTE_FILE
    if step is None:
        note.unlink(missing_ok=True)
        return None
    if done := _read_note(note, step):
        logger.info("checkpoint.load_step = %d was done at %s: the run goes on (without %s it goes back again)", step, done, note)
        return None
    steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(config.checkpoint_folder)]
    if step not in steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        raise UserError(
            f'checkpoint.load_step = {step}: "{config.checkpoint_folder}" has no checkpoint of this step ({there}): name one '
            "that is there, or leave the option out"
        )
    return step


def go_back(config: JobConfig, step: int) -> None:
    """Rename newer checkpoints and exports, keep a copy of the metrics, and note that it was done.

    If interrupted, it can be repeated. The resume itself cuts the records.
    """
    folder = Path(config.job.dump_folder)
    newer = [path for path in list_folders(config.checkpoint_folder) if int(path.name.removeprefix("step-")) > step]
    suffix = _choose_suffix(folder, config.checkpoint_folder)
    if newer:
        exports = [path for path in sorted(folder.glob(EXPORTS)) if _is_newer_export(path.name, step)]
        if (folder / METRICS_FILE).exists():
            shutil.copyfile(folder / METRICS_FILE, folder / f"{METRICS_FILE}.{suffix}")
        for path in [*exports, *newer]:
            replace(path, path.with_name(f"{path.name}.{suffix}"))
        sync_to_disk(config.checkpoint_folder)
        names = ", ".join(path.name for path in [*newer, *exports])
        logger.warning("back to step %d: %s and a copy of %s are set aside as *.%s", step, names, METRICS_FILE, suffix)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    write_durably(folder / NOTE_FILE, json.dumps({"load_step": step, "time": time}).encode())


def _read_note(note: Path, step: int) -> str | None:
    """When the run went back to this step; None if it did not."""
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        return str(content["time"]) if content["load_step"] == step else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _choose_suffix(*folders: Path) -> str:
    names = [path.name for folder in folders for path in folder.iterdir()]
    taken = [int(match[1]) for name in names if (match := re.search(r"\.set-aside-(\d+)$", name))]
    return f"set-aside-{max(taken, default=0) + 1}"


def _is_newer_export(name: str, step: int) -> bool:
    """Whether a folder holds the exported model of a later step. `hf` is the last one's."""
    match = re.fullmatch(r"hf-step-(\d+)", name)
    return name == "hf" or (match is not None and int(match[1]) > step)
