"""`dataset = "parquet"` and `dataset = "arrow"`: one document per row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flame.data.sources.cells import CellReader
from flame.data.sources.containers import open_seekable
from flame.data.sources.contents import classify_type, decode_dictionary
from flame.data.sources.tables import FileColumnKind

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 1024


class Parquet(FileColumnKind):
    """Parquet files."""

    name = "parquet"
    uses = frozenset({"data_files", "text_column", "streaming"})
    suffixes = (".parquet",)

    def examine(self, path: str) -> tuple[pa.Schema, int]:
        with _open_parquet(path) as file:
            return file.schema_arrow, file.metadata.num_rows

    def build_reader(self, cell_type: pa.DataType) -> CellReader:
        return ParquetColumn(cell_type, self.corpus.text_column)


class Arrow(FileColumnKind):
    """Arrow files: the stream format, as `datasets` writes it, or the file format."""

    name = "arrow"
    uses = frozenset({"data_files", "text_column", "streaming"})
    suffixes = (".arrow", ".feather")

    def examine(self, path: str) -> tuple[pa.Schema, None]:
        with _open_arrow(path) as (schema, _):
            return schema, None

    def build_reader(self, cell_type: pa.DataType) -> CellReader:
        return ArrowColumn(cell_type, self.corpus.text_column)


@dataclass(frozen=True)
class ParquetColumn(CellReader):
    """One column of parquet files."""

    column: str

    def read(self, path: str) -> Iterator[pa.Array]:
        with _open_parquet(path) as file:
            check_same_type(file.schema_arrow, self.column, self.cell_type)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[self.column]):
                yield cast(batch.column(self.column), self.cell_type)


@dataclass(frozen=True)
class ArrowColumn(CellReader):
    """One column of Arrow files."""

    column: str

    def read(self, path: str) -> Iterator[pa.Array]:
        with _open_arrow(path) as (schema, batches):
            check_same_type(schema, self.column, self.cell_type)
            for batch in batches:
                yield cast(batch.column(self.column), self.cell_type)


def check_same_type(schema: pa.Schema, column: str, wanted: pa.DataType) -> None:
    """Check a file that was not examined before.

    Raises:
        ValueError: it lacks the column, or holds something else in it.
    """
    import pyarrow as pa

    if column not in schema.names:
        raise ValueError(f"it has no column {column}")
    found = decode_dictionary(schema.field(column).type)
    if not pa.types.is_null(found) and classify_type(found) != classify_type(wanted):
        raise ValueError(f"column {column} is {found}, not {wanted}")


def cast(cells: pa.Array, wanted: pa.DataType) -> pa.Array:
    """The cells as another type. Texts stay as they are: whether they are UTF-8 is found when they are read."""
    return cells if cells.type.equals(wanted) else cells.cast(wanted)


@contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with open_seekable(path) as content, pq.ParquetFile(content) as file:
        yield file


@contextmanager
def _open_arrow(path: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    import pyarrow as pa

    with open_seekable(path) as content:
        is_file_format = content.read(6) == b"ARROW1"
        content.seek(0)
        if is_file_format:
            file = pa.ipc.open_file(content)
            yield file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            stream = pa.ipc.open_stream(content)
            yield stream.schema, iter(stream)
