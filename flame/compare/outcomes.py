"""How a run has ended, as a file in its folder says. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

OUTCOME_FILE = "outcome.json"
LOG_FILE = "log.txt"

COMPLETE, STOPPED, FAILED, UNFINISHED = "complete", "reached stop_at", "failed", "unfinished"
ENDED = (COMPLETE, STOPPED)
"""These runs are never made again."""
LONGEST_LINE = 300


class Outcome(NamedTuple):
    state: str
    line: str = ""
    """Of a failed run, the last line of its log."""


def read_outcome(folder: Path) -> Outcome:
    """How the run of a folder has ended; `UNFINISHED` if it has not."""
    try:
        values = json.loads((folder / OUTCOME_FILE).read_text())
        return Outcome(str(values["state"]), str(values["line"]))
    except (OSError, ValueError, LookupError, TypeError):
        return Outcome(UNFINISHED)


def write_outcome(folder: Path, outcome: Outcome) -> None:
    temporary = folder / f"{OUTCOME_FILE}.tmp"
    temporary.write_text(json.dumps(outcome._asdict()) + "\n")
    temporary.replace(folder / OUTCOME_FILE)


def clear_outcome(folder: Path) -> None:
    """Before a run is tried again."""
    (folder / OUTCOME_FILE).unlink(missing_ok=True)


def read_last_line(log: Path) -> str:
    """The last line of a log that holds text, in short."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    last = next((line for line in reversed(lines) if line), "")
    return last if len(last) <= LONGEST_LINE else f"{last[:LONGEST_LINE]}..."
