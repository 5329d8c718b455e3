"""`dataset = "parquet"`: one document per row of parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flame.data.sources.tables import ColumnKind, FileKind, escape_all, load_table


class Parquet(ColumnKind, FileKind):
    """Parquet files with a column of texts."""

    name = "parquet"
    uses = frozenset({"data_files", "text_column", "streaming"})
    suffixes = (".parquet",)

    def load(self) -> Any:
        return load_table(self, "parquet", data_files=escape_all(self.list_filled_files(_count_rows)), split="train")


def _count_rows(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException):
        return 1  # broken, not empty: loading the file reports it
