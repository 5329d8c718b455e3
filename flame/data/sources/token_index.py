"""What is known of a file of token ids after it was read once: where documents begin, and the smallest and largest id.

It is kept (`flame.data.sources.index_cache`). Reading a file once goes at the speed of memory or disk. What is known of a faulty
file is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flame.data.sources.index_cache import INDEX_DTYPE, KeptArray, find_index, keep_index, map_file

TOKENS_AT_ONCE = 1 << 24
HEADER = 4
"""Integers before the offsets: version, smallest id, largest id, whether every second token is 0."""
VERSION = 2


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

    def __init__(self, kept: KeptArray):
        self._kept = kept

    @property
    def content(self) -> np.ndarray:
        """int64 [HEADER + documents + 1]"""
        return self._kept.array

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
    path = find_index([str(VERSION), *told], files)
    if _is_complete(path):
        index = TokenIndex(KeptArray(path))
        return index, find_fault(index)
    scan, offsets = make()
    header = [VERSION, scan.smallest, scan.largest, scan.is_every_second_zero]
    content = np.concatenate([np.asarray(header, dtype=INDEX_DTYPE), offsets.astype(INDEX_DTYPE)])
    if fault := find_fault(TokenIndex(KeptArray(content))):
        return TokenIndex(KeptArray(content)), fault
    return TokenIndex(keep_index(path, content)), None


def _is_complete(path: Path) -> bool:
    try:
        size = path.stat().st_size
        return size >= HEADER * INDEX_DTYPE.itemsize and int(map_file(path, INDEX_DTYPE)[0]) == VERSION
    except (OSError, ValueError):
        return False
