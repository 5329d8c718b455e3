"""The data audit: records what a run was trained on, with a line for each sequence of each step.

Step 9 in the life of a batch (`flame.data.loader`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flame.data.batch import PackedBatch
from flame.runtime.appended_file import AppendedFile
from flame.runtime.json_lines import parse_line

AUDIT_FOLDER = "audit"
BLOCK = 1 << 16


def drop_audit_after(folder: Path, step: int) -> None:
    """Remove the lines of later steps, which an earlier process of the run wrote. Call it on one rank, before any `AuditLog` is
    opened."""
    for path in sorted((folder / AUDIT_FOLDER).glob("rank-*.jsonl")):  # earlier starts may have had more ranks
        _truncate_after(path, step)


def _truncate_after(path: Path, step: int) -> None:
    """Cut off the last lines that are incomplete or of later steps. Steps only grow, so earlier lines need not be read."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end and not _is_kept(last := _read_last_line(file, end), step):
            end -= len(last)
        file.truncate(end)


def _read_last_line(file: BinaryIO, end: int) -> bytes:
    """The last line in the first `end` bytes, with its line end if it has one."""
    suffix, start = b"", end
    while start:
        size = min(BLOCK, start)
        start -= size
        file.seek(start)
        suffix = file.read(size) + suffix
        line_end = suffix.rfind(b"\n", 0, len(suffix) - 1)
        if line_end >= 0:
            return suffix[line_end + 1 :]
    return suffix


def _is_kept(line: bytes, step: int) -> bool:
    row = parse_line(line) if line.endswith(b"\n") else None
    return row is not None and row["step"] <= step


class AuditLog:
    """Writes this rank's lines to `audit/rank-R.jsonl`.

    A line has `step`, `sequence`, `source`, `trained` (False for a skipped step) and `pieces`, the chunks. Each chunk is a list:
    document, first token, last token + 1, epoch, whether the document ends there.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path, rank: int):
        (folder / AUDIT_FOLDER).mkdir(exist_ok=True)
        self._file = AppendedFile(folder / AUDIT_FOLDER / f"rank-{rank:05d}.jsonl")

    def record(self, step: int, batches: list[PackedBatch], trained: bool) -> None:
        """Write the sequences of one step."""
        for batch in batches:
            line = {
                "step": step,
                "sequence": batch.sequence_index,
                "source": batch.source,
                "trained": trained,
                "pieces": [list(chunk) for chunk in batch.documents],
            }
            self._file.write(json.dumps(line))

    def sync(self) -> None:
        """Flush the lines to disk. Call it before committing the checkpoint that they belong to."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def read_audit(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's folder, in no particular order."""
    for path in sorted((folder / AUDIT_FOLDER).glob("rank-*.jsonl")):
        with path.open("rb") as lines:
            for line in lines:
                row = parse_line(line)
                if row is not None:
                    yield row
