"""Files with one JSON object per line, each with its step. A resumed run removes later lines and continues the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flame.runtime.disk import replace


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object in a line, with key "step". None if the line is incomplete or has no step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of later steps, and lines that a crash left incomplete. Does nothing if there is no file."""
    rewrite_lines(path, lambda row: row["step"] <= step)


def rewrite_lines(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Keep only the complete lines of a file for which `is_kept` is true. The file is replaced at once."""
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, temporary.open("wb") as new:
        for line in old:
            row = parse_line(line)
            if row is not None and is_kept(row):
                new.write(line.removesuffix(b"\n") + b"\n")
        new.flush()
        os.fsync(new.fileno())
    replace(temporary, path)
