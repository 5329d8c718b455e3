"""The folder of a run: what may stand in the places of the files that a run writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from flame.checkpoints.going_back import NOTE_FILE
from flame.config.run import CHECKPOINT_FOLDER, CURVES_FILE, FIRST_STEP_FILE, STARTS_FILE
from flame.data.audit import AUDIT_FOLDER
from flame.errors import UserError
from flame.logging.writers.json_lines import METRICS_FILE
from flame.logging.writers.wandb import WANDB_ID_FILE
from flame.runtime.lock import LOCK_FILE
from flame.trainer.finish import FINISHED_FILE
from flame.trainer.guard import SKIPPED_FILE
from flame.trainer.run_record import CONFIG_FILE

FILES = (
    *(LOCK_FILE, CONFIG_FILE, STARTS_FILE, FIRST_STEP_FILE, METRICS_FILE, SKIPPED_FILE, NOTE_FILE, FINISHED_FILE),
    *(WANDB_ID_FILE, CURVES_FILE),
    *(f"{name}.tmp" for name in (METRICS_FILE, SKIPPED_FILE)),
)
FOLDERS = (CHECKPOINT_FOLDER, AUDIT_FOLDER)
"""These may be links to folders on another disk."""


def check_places(folder: Path) -> None:
    """Check that nothing else is where the run will write. Through a link it would overwrite a file elsewhere.

    Raises:
        UserError: one line for each file that is none.
    """
    if faults := list(_find_faults(folder)):
        raise UserError(*faults)


def _find_faults(folder: Path) -> Iterator[str]:
    advice = "the run writes a file of this name: move it away"
    for path in (*(folder / name for name in FILES), *sorted((folder / AUDIT_FOLDER).glob("rank-*.jsonl"))):
        if path.is_symlink():
            yield f'"{path}" is a link to "{os.readlink(path)}": {advice}'
        elif path.exists() and not path.is_file():
            yield f'"{path}" is no file: {advice}'
    for path in (folder / name for name in FOLDERS):
        if os.path.lexists(path) and not path.is_dir():
            yield f'"{path}" is no folder: the run writes a folder of this name: move it away'
