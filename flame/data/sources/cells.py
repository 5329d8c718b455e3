"""Reads one column of files, cell by cell: what the kinds of files have in common.

Streaming or not, the same reader reads them, so that the same data give the same documents.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from flame.data.sources.contents import Content, Decode, Document
from flame.errors import UserError, give_reason

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

CELL = "cell"
"""Name of the column in a copy."""
READERS_VERSION = "2"
"""Raise it when a reader gives other cells than before: copies made by older readers are then not used."""
ROWS_AT_ONCE = 256
"""Rows that a streamed table reads at once."""


@dataclass(frozen=True)
class CellReader(ABC):
    """Reads the cells of one kind of file. Its fields decide what it reads; it is pickled into workers."""

    cell_type: pa.DataType

    @abstractmethod
    def read(self, path: str) -> Iterator[pa.Array]:
        """Yield the cells of a file in order, some at a time, as `cell_type`. May raise anything."""


class UnreadableFile(Exception):
    """A file cannot be read; the cause says why."""

    def __init__(self, path: str):
        super().__init__(path)
        self.path = path


def read_cells(reader: CellReader, path: str) -> Iterator[pa.Array]:
    """As `reader.read`, but all that goes wrong is an `UnreadableFile`."""
    try:
        yield from reader.read(path)
    except Exception as error:  # the network, the file system, Arrow and the decompressors raise many types
        raise UnreadableFile(path) from error


class CellRows(ABC):
    """Rows whose cells are decoded into documents."""

    def __init__(self, decode: Decode, content: Content):
        self._decode = decode
        self.content = content
        """What the rows hold."""

    @abstractmethod
    def list_cells(self) -> Iterator[Any]:
        """Yield all cells, undecoded."""

    def list_first_cells(self) -> Iterator[Any]:
        """Yield the first of `list_cells`."""
        return islice(self.list_cells(), ROWS_AT_ONCE)

    def decode_as(self, content: Content, decode: Decode) -> None:
        """Take the cells for something else."""
        self.content, self._decode = content, decode


class TableRows(CellRows):
    """One document per row of a memory-mapped table."""

    def __init__(self, table: datasets.Dataset, column: str, decode: Decode, content: Content = "text"):
        super().__init__(decode, content)
        self._table, self._column = table, column

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> Document | None:
        try:
            return self._decode(self._table[index][self._column])
        except UnicodeDecodeError:  # Arrow does not check the bytes of its strings until one is read
            return None

    def list_cells(self) -> Iterator[Any]:
        return (self._table[index][self._column] for index in range(len(self)))


class _Shards(CellRows):
    """One document per row, in shards that are read in order."""

    num_shards: int

    def __init__(self, decode: Decode, option: str, content: Content):
        super().__init__(decode, content)
        self._option = option

    @abstractmethod
    def _read_arrays(self, shard: int) -> Iterator[pa.Array]: ...

    def _name(self, shard: int) -> str:
        """What the shard is, for error lines."""
        return ""

    def read_shard(self, shard: int, row: int) -> Iterator[Document | None]:
        # Read undecoded cells: skipping the rows before `row` is cheap, and a bad row does not end the iteration.
        first = 0
        try:
            for cells in self._read_arrays(shard):
                for index in range(max(row - first, 0), len(cells)):
                    yield self._decode_cell(cells[index])
                first += len(cells)
        except Exception as error:  # the network, the file system, Arrow and the decompressors raise many types
            raise UserError(
                f"{self._option}: shard {shard} of {self.num_shards} cannot be read after row {first} "
                f"({self._name(shard)}{find_reason(error)}): check the file or the network; the same command goes on from the "
                "last checkpoint"
            ) from error

    def list_cells(self) -> Iterator[Any]:
        return (cell.as_py() for shard in range(self.num_shards) for cells in self._read_arrays(shard) for cell in cells)

    def _decode_cell(self, cell: pa.Scalar) -> Document | None:
        try:
            return self._decode(cell.as_py())
        except UnicodeDecodeError:
            return None


class FileShards(_Shards):
    """Each file is a shard."""

    def __init__(self, files: list[str], reader: CellReader, decode: Decode, option: str, content: Content = "text"):
        super().__init__(decode, option, content)
        self._files, self._reader = files, reader
        self.num_shards = len(files)

    def _read_arrays(self, shard: int) -> Iterator[pa.Array]:
        return self._reader.read(self._files[shard])

    def _name(self, shard: int) -> str:
        return f'"{self._files[shard]}": '


class TableShards(_Shards):
    """The shards of a streamed table of `datasets`."""

    def __init__(self, table: datasets.IterableDataset, column: str, decode: Decode, option: str, content: Content = "text"):
        super().__init__(decode, option, content)
        self._table, self._column = table, column
        self.num_shards = table.num_shards

    def _read_arrays(self, shard: int) -> Iterator[pa.Array]:
        tables = self._table.shard(self.num_shards, shard).with_format("arrow").iter(ROWS_AT_ONCE)
        return (table[self._column] for table in tables)


@contextmanager
def datasets_silenced() -> Iterator[None]:
    """Keep `datasets` from drawing bars, and from logging failures that it also raises."""
    import datasets

    datasets.disable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def find_unreadable(error: BaseException) -> str:
    """The file whose fault an error is; empty if it is not that of one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UnreadableFile):
            return cause.path
        cause = cause.__cause__
    return ""


def find_reason(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return give_reason(error)
