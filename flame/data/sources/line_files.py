"""Lines of plain local files, read in place. One pass finds where they begin, and is kept (`flame.data.sources.index_cache`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import FileIO

import numpy as np

from flame.config.addresses import is_remote
from flame.data.sources.cells import CellRows
from flame.data.sources.containers import is_plain
from flame.data.sources.contents import Content, Decode, Document
from flame.data.sources.index_cache import KeptArray, find_index, keep_index
from flame.errors import UserError

BYTES_AT_ONCE = 1 << 20
OPEN_FILES = 64
VERSION = "lines 1"
LINE_FEED, CARRIAGE_RETURN = b"\n\r"


class LineRows(CellRows):
    """One document per line. Pickled as the paths and the index, so that worker processes read the files themselves.

    A cell is a line as `Lines` reads it, with its end: its bytes as latin-1.
    """

    def __init__(self, files: list[str], index: KeptArray, decode: Decode, content: Content = "text"):
        """
        Args:
            index: of `index_lines`.
        """
        super().__init__(decode, content)
        self._files, self._index = files, index
        self._states = [_describe_state(os.stat(path)) for path in files]

    def __len__(self) -> int:
        return int(self._index.array[len(self._files)])

    def read(self, index: int) -> Document | None:
        """
        Raises:
            UserError: the file was changed since it was opened.
        """
        try:
            return self._decode(self._read_cell(index))
        except UnicodeDecodeError:
            return None

    def list_cells(self) -> Iterator[str]:
        return map(self._read_cell, range(len(self)))

    def _read_cell(self, index: int) -> str:
        firsts, starts = self._index.array[: len(self._files) + 1], self._index.array[len(self._files) + 1 :]
        number = int(firsts.searchsorted(index, side="right")) - 1
        start, stop = starts[index + number : index + number + 2].tolist()
        path = self._files[number]
        line = os.pread(_open(path, self._states[number]).fileno(), stop - start, start)
        if len(line) != stop - start:
            raise _explain_change(path)
        return line.decode("latin-1")


def open_lines(files: list[str], decode: Decode) -> LineRows | None:
    """The lines of files; None if one of them is remote, compressed, an archive, or cannot be read."""
    if any(map(is_remote, files)):
        return None
    path = find_index([VERSION], files)
    if path.exists():
        return LineRows(files, KeptArray(path), decode)
    if not all(map(is_plain, files)):
        return None
    return LineRows(files, keep_index(path, index_lines(files)), decode)


def index_lines(files: Sequence[str]) -> np.ndarray:
    """Where the lines of files begin. A line ends with a line feed, a carriage return, or both; the last one need not end.

    Returns:
        int64 [files + 1 + lines + files]: the number of the first line of each file, and of all lines; then for each file the
        positions of its lines and its size.
    """
    starts = [_find_starts(path) for path in files]
    counts = [len(each) - 1 for each in starts]
    return np.concatenate([np.cumsum([0, *counts]), *starts]).astype(np.int64)


def _find_starts(path: str) -> np.ndarray:
    """int64 [lines + 1]: positions of the lines of a file, and its size."""
    parts = [np.zeros(1, dtype=np.int64)]
    buffer = bytearray(BYTES_AT_ONCE)
    position, follows_return = 0, False
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            chunk = np.frombuffer(buffer, np.uint8, count)
            ends = np.flatnonzero(chunk == LINE_FEED)
            if follows_return and chunk[0] != LINE_FEED:
                parts.append(np.array([position]))
            returns = np.flatnonzero(chunk == CARRIAGE_RETURN)
            follows_return = len(returns) > 0 and returns[-1] == count - 1
            if len(returns):
                inner = returns[: len(returns) - follows_return]
                ends = np.sort(np.concatenate([ends, inner[chunk[inner + 1] != LINE_FEED]]))
            parts.append(ends + (position + 1))
            position += count
    starts = np.concatenate(parts)
    return starts if starts[-1] == position else np.append(starts, position)


@lru_cache(OPEN_FILES)
def _open(path: str, state: tuple[int, int]) -> FileIO:
    """The file, open in this process. The least recently used one closes.

    Raises:
        UserError: it is another one than was indexed.
    """
    file = FileIO(path)
    if _describe_state(os.fstat(file.fileno())) != state:
        raise _explain_change(path)
    return file


def _describe_state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _explain_change(path: str) -> UserError:
    return UserError(f'"{path}" was changed while it is read: start again, and leave the file as it is until the end')
