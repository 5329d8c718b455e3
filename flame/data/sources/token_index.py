"""What is known of a file of token ids after it was read once: where documents begin, and the smallest and largest id.

It is kept in a cache beside that of `datasets`, under the file's path, size and times, so that later starts, other ranks and
worker processes map it. Reading a file once goes at the speed of memory or disk. What is known of a faulty file is not kept.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flame.data.sources.files import describe_version

TOKENS_AT_ONCE = 1 << 24
HEADER = 4
"""Integers before the offsets: version, smallest id, largest id, whether every second token is 0."""
VERSION = 2
OFFSET_DTYPE = np.dtype("<i8")


class Scan(NamedTuple):
    """What one pass over the tokens of a file found."""

    smallest: int
    largest: int
    is_every_second_zero: bool
    """As uint32 with small ids looks when it is read as uint16."""
    ends: np.ndarray
    """int64 [n]: positions of the end-of-text id, if it was looked for."""


def scan_tokens(tokens: np.ndarray, end_of_text: int | None = None) -> Scan:
    """Read all tokens once.

    Args:
        tokens: integers [n], n >= 1.
        end_of_text: the id to look for.
    """
    smallest, largest, is_every_second_zero, ends = 1 << 62, -1, len(tokens) > 1, []
    for start in range(0, len(tokens), TOKENS_AT_ONCE):
        part = tokens[start : start + TOKENS_AT_ONCE]
        smallest, largest = min(smallest, int(part.min())), max(largest, int(part.max()))
        is_every_second_zero = is_every_second_zero and not part[(start + 1) % 2 :: 2].any()
        if end_of_text is not None:
            ends.append(np.flatnonzero(part == end_of_text) + start)
    return Scan(smallest, largest, is_every_second_zero, np.concatenate(ends) if ends else np.empty(0, dtype=np.int64))


class TokenIndex:
    """A `Scan`, and the boundaries of the documents: int64 [documents+1]. Pickled as the path of its file."""

    def __init__(self, content: np.ndarray | Path):
        self._content = content
        self._mapped: np.ndarray | None = None if isinstance(content, Path) else content

    def __reduce__(self) -> tuple[type[TokenIndex], tuple[np.ndarray | Path]]:
        return TokenIndex, (self._content,)

    @property
    def content(self) -> np.ndarray:
        """int64 [HEADER + documents + 1]"""
        if self._mapped is None:
            assert isinstance(self._content, Path)
            self._mapped = map_file(self._content, OFFSET_DTYPE)
        return self._mapped

    @property
    def smallest(self) -> int:
        return int(self.content[1])

    @property
    def largest(self) -> int:
        return int(self.content[2])

    @property
    def is_every_second_zero(self) -> bool:
        return bool(self.content[3])

    @property
    def offsets(self) -> np.ndarray:
        return self.content[HEADER:]


def open_index(
    told: list[str], files: list[str], make: Callable[[], tuple[Scan, np.ndarray]], find_fault: Callable[[TokenIndex], str | None]
) -> tuple[TokenIndex, str | None]:
    """The index of a file, from the cache or made now, and the file's fault.

    Args:
        told: all that decides its content, beside the files.
        files: paths of the files that `make` reads.
        make: reads the files, and returns what it found with the boundaries of the documents.
        find_fault: why the files cannot be used. Then the index is not kept: a correct copy may have the same size and time.
    """
    name = hashlib.sha256("\n".join([str(VERSION), *told, *map(_describe_state, files)]).encode()).hexdigest()[:32]
    path = find_cache() / f"{name}.idx"
    if _is_complete(path):
        return TokenIndex(path), find_fault(TokenIndex(path))
    scan, offsets = make()
    header = [VERSION, scan.smallest, scan.largest, scan.is_every_second_zero]
    content = np.concatenate([np.asarray(header, dtype=OFFSET_DTYPE), offsets.astype(OFFSET_DTYPE)])
    if fault := find_fault(TokenIndex(content)):
        return TokenIndex(content), fault
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content.tobytes())
        os.replace(file.name, path)
    except OSError:  # nowhere to keep it: each start reads the file again
        return TokenIndex(content), None
    return TokenIndex(path), None


def find_cache() -> Path:
    """Folder of the indices."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")), "flame_tokens")


def _describe_state(path: str) -> str:
    return "\n".join([*describe_version(path), str(os.stat(path).st_ctime_ns)])


def map_file(path: Path, dtype: np.dtype, start: int = 0, count: int = -1) -> np.ndarray:
    """Map a file into memory as a read-only array, [n], n >= 1.

    Args:
        start: first byte. count: how many; -1 takes all.
    """
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype, count, start)


def sum_lengths(lengths: np.ndarray, holdout_every: int) -> int:
    """Tokens of all documents but every `holdout_every`-th, from the first on; 0 counts all."""
    held_out = lengths[::holdout_every] if holdout_every else lengths[:0]
    return int(lengths.sum() - held_out.sum())


def _is_complete(path: Path) -> bool:
    try:
        size = path.stat().st_size
        return size >= HEADER * OFFSET_DTYPE.itemsize and int(map_file(path, OFFSET_DTYPE)[0]) == VERSION
    except (OSError, ValueError):
        return False
