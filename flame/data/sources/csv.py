"""`dataset = "csv"`: one document per row of comma- or tab-separated files with a line of column names."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from flame.data.sources.base import TextRows, TextShards
from flame.data.sources.cells import CellReader
from flame.data.sources.containers import COMPRESSION_SUFFIXES, open_contents
from flame.data.sources.contents import Content, Decode
from flame.data.sources.tables import FileColumnKind
from flame.data.sources.text import decode_text

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 1024
TAB_SUFFIX = ".tsv"
SUFFIXES = (".csv", TAB_SUFFIX)
BYTE_ORDER_MARK = b"\xef\xbb\xbf".decode("latin-1")


class Csv(FileColumnKind):
    """Comma- or tab-separated files. All cells are texts: numbers and words such as NA are nothing else."""

    name = "csv"
    uses = frozenset({"data_files", "text_column", "streaming"})
    suffixes = SUFFIXES

    def examine(self, path: str) -> tuple[pa.Schema, int | None]:
        import pyarrow as pa

        for name, content in open_contents(path, SUFFIXES):
            if first := next(_Rows(content, name), None):
                return pa.schema([(column, pa.string()) for column in decode_names(first)]), None
        return pa.schema([]), 0

    def build_reader(self, cell_type: pa.DataType) -> CellReader:
        return CsvColumn(cell_type, self.corpus.text_column)

    def choose_decoder(self, content: Content) -> Decode:
        return decode_cell

    def advise(self, rows: TextRows | TextShards) -> str:
        return f"{super().advise(rows)}, and that each row has as many cells as the line of names"


@dataclass(frozen=True)
class CsvColumn(CellReader):
    """One column. Bytes are read as latin-1, one character each, so that a cell that is not UTF-8 affects no other.

    A row with more or fewer cells than the line of names has no value: which cell is which is unknown.
    """

    column: str

    def read(self, path: str) -> Iterator[pa.Array]:
        import pyarrow as pa

        for name, content in open_contents(path, SUFFIXES):
            rows = _Rows(content, name)
            names = decode_names(next(rows, []))
            if names.count(self.column) != 1:
                if not names:
                    continue
                raise ValueError(f"it has no column {self.column}, or several")
            place = names.index(self.column)
            while part := [row[place] if len(row) == len(names) else None for row in islice(rows, ROWS_AT_ONCE)]:
                yield pa.array(part, self.cell_type)


class _Rows:
    """The rows of a file, without blank lines."""

    def __init__(self, content: BinaryIO, name: str):
        csv.field_size_limit(sys.maxsize)
        self._at_end = False
        self._reader = csv.reader(self._list_lines(content), **choose_format(name))

    def __iter__(self) -> _Rows:
        return self

    def __next__(self) -> list[str]:
        row: list[str] = []
        while not row:
            begin = self._reader.line_num + 1
            row = next(self._reader)
            if self._at_end:  # the reader still waited for the end of a quoted cell
                raise ValueError(f"EOF inside string: a quote in the row that begins in line {begin} is not closed")
        return row

    def _list_lines(self, content: BinaryIO) -> Iterator[str]:
        lines = io.TextIOWrapper(content, encoding="latin-1", newline="")
        yield from (line.removeprefix(BYTE_ORDER_MARK) for line in islice(lines, 1))
        yield from lines
        self._at_end = True


def decode_names(cells: list[str]) -> list[str]:
    """Names of columns whose bytes were read as latin-1."""
    return [cell.encode("latin-1").decode("utf-8", "replace") for cell in cells]


def decode_cell(cell: str | None) -> str | None:
    """Return the text of a cell whose bytes were read as latin-1; None if the row has none."""
    return None if cell is None else decode_text(cell)


def choose_format(name: str) -> dict[str, Any]:
    """How a file is to be read, by its name. Tab-separated files have no quotes: a quote is a character like others."""
    suffixes = [suffix for suffix in Path(name.lower()).suffixes if suffix not in COMPRESSION_SUFFIXES]
    if suffixes[-1:] == [TAB_SUFFIX]:
        return {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    return {"delimiter": ","}
