"""`dataset = "csv"`: one document per row of comma- or tab-separated files with a line of column names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.data.sources.cells import CellReader
from flame.data.sources.containers import COMPRESSION_SUFFIXES, open_contents
from flame.data.sources.contents import Content, Decode
from flame.data.sources.tables import FileColumnKind
from flame.data.sources.text import decode_text

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 1024
TAB_SUFFIX = ".tsv"


class Csv(FileColumnKind):
    """Comma- or tab-separated files. All cells are texts: numbers and words such as NA are nothing else."""

    name = "csv"
    uses = frozenset({"data_files", "text_column", "streaming"})
    suffixes = (".csv", TAB_SUFFIX)

    def examine(self, path: str) -> tuple[pa.Schema, int | None]:
        import pandas as pd
        import pyarrow as pa

        names: list[str] = []
        for content in open_contents(path):
            try:
                names = list(pd.read_csv(content, nrows=0, **choose_format(path)))
            except pd.errors.EmptyDataError:
                continue
            break
        return pa.schema({name: pa.string() for name in names}), None if names else 0

    def build_reader(self, cell_type: pa.DataType) -> CellReader:
        return CsvColumn(cell_type, self.corpus.text_column)

    def choose_decoder(self, content: Content) -> Decode:
        return decode_text


@dataclass(frozen=True)
class CsvColumn(CellReader):
    """One column. Bytes are read as latin-1, one character each, so that a cell that is not UTF-8 affects no other."""

    column: str

    def read(self, path: str) -> Iterator[pa.Array]:
        import pandas as pd
        import pyarrow as pa

        for content in open_contents(path):
            try:
                parts = pd.read_csv(
                    content,
                    usecols=[self.column],
                    dtype=str,
                    keep_default_na=False,
                    na_filter=False,
                    chunksize=ROWS_AT_ONCE,
                    **choose_format(path),
                )
            except pd.errors.EmptyDataError:
                continue
            for part in parts:
                yield pa.array(part[self.column].tolist(), self.cell_type)


def choose_format(path: str) -> dict[str, Any]:
    """How pandas is to read a file, by its name."""
    suffixes = [suffix for suffix in Path(path.lower()).suffixes if suffix not in COMPRESSION_SUFFIXES]
    return {"encoding": "latin-1", "sep": "\t" if suffixes[-1:] == [TAB_SUFFIX] else ",", "compression": None}
