"""Shared code of the sources that use `datasets`: rows of Arrow tables, local files, and error lines.

`datasets` and Arrow are imported when a source is opened, not before.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.config.schema import JobConfig
from flame.data.sources.base import SourceKind, TextRows, TextShards, explain_emptiness, keep_text
from flame.errors import UserError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

ROWS_AT_ONCE = 256
"""Rows that a streaming source reads at once."""
FILE_KINDS = '"text", "json" or "parquet"'
"""For error lines."""

Decode = Callable[[Any], str | None]
"""Returns the text of a cell, or None for a bad one. May raise UnicodeDecodeError."""


class TableRows:
    """One document per row of a memory-mapped table."""

    def __init__(self, table: datasets.Dataset, column: str, decode: Decode):
        self._table, self._column, self._decode = table, column, decode

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> str | None:
        try:
            return self._decode(self._table[index][self._column])
        except UnicodeDecodeError:  # Arrow does not check the bytes of its strings until one is read
            return None

    def read_first_cells(self) -> list[Any]:
        """Return undecoded cells, for error lines."""
        return self._table[:ROWS_AT_ONCE][self._column]


class TableShards:
    """One document per row, in shards (mostly files) that are read in order."""

    def __init__(self, table: datasets.IterableDataset, column: str, decode: Decode, option: str):
        self._table, self._column, self._decode, self._option = table, column, decode, option
        self.num_shards = table.num_shards

    def read_shard(self, shard: int, row: int) -> Iterator[str | None]:
        # Read tables of undecoded cells: skipping the rows before `row` is cheap, and a bad row does not end the iteration.
        tables = self._table.shard(self.num_shards, shard).with_format("arrow").iter(ROWS_AT_ONCE)
        first = 0
        try:
            for table in tables:
                cells = table[self._column]
                for index in range(max(row - first, 0), len(cells)):
                    yield self._decode_cell(cells[index])
                first += len(cells)
        except Exception as error:  # the network, the file system, Arrow and the decompressors raise many types
            raise UserError(
                f"{self._option}: shard {shard} of {self.num_shards} cannot be read after row {first} ({find_reason(error)}): "
                "check the file or the network; the same command goes on from the last checkpoint"
            ) from error

    def read_first_cells(self) -> list[Any]:
        """Return undecoded cells, for error lines."""
        tables = self._table.with_format("arrow").iter(ROWS_AT_ONCE)
        return next(iter(tables))[self._column].to_pylist()

    def _decode_cell(self, cell: pa.Scalar) -> str | None:
        try:
            return self._decode(cell.as_py())
        except UnicodeDecodeError:
            return None


class FileKind(SourceKind):
    """A kind of source that reads local files."""

    def find_conflicts(self, job: JobConfig) -> Iterator[str]:
        yield from super().find_conflicts(job)
        if not self.corpus.data_files:
            yield f"{self.option} needs {self.section}.data_files (paths or globs, separated by commas)"
        for pattern in filter(None, self.corpus.data_files.split(",")):
            if not any(map(os.path.isfile, _expand_glob(pattern))):
                yield f'{self.section}.data_files: "{pattern.strip()}" matches no file'

    def list_files(self) -> list[Path]:
        """The files that `data_files` matches, in order, without duplicates."""
        patterns = filter(None, self.corpus.data_files.split(","))
        paths = [path.absolute() for pattern in patterns for path in _expand_glob(pattern) if path.is_file()]
        return list(dict.fromkeys(paths))

    def list_content_files(self) -> list[Path]:
        return self.list_files()

    def list_filled_files(self, count_content: Callable[[Path], int]) -> list[Path]:
        """The files that are not empty: `load_dataset` fails on an empty file that comes before another."""
        files = [path for path in self.list_files() if count_content(path)]
        if not files:
            raise UserError(explain_emptiness(self))
        return files

    def load_rows(self, files: list[Path], sample_by: str, decode: Decode) -> TableRows | TableShards:
        """Load text files as latin-1, one character per byte, so that a row that is not UTF-8 does not affect other rows.

        Line ends are not kept: reading in text mode turns CRLF and CR into LF.
        """
        import datasets

        features = datasets.Features({"text": datasets.Value("string")})
        options = {"encoding": "latin-1", "sample_by": sample_by, "features": features, "data_files": escape_all(files)}
        return wrap_table(self, load_table(self, "text", split="train", **options), "text", decode)


class ColumnKind(SourceKind):
    """A kind of source whose texts are in a column of strings, `text_column`."""

    def open(self) -> TableRows | TableShards:
        table, column = self.load(), self.corpus.text_column
        if table.features is None:
            try:
                table = table._resolve_features()  # reads the first rows
            except Exception as error:  # as in `load_table`
                raise UserError(_explain_failure(self, error)) from error
        _check_column(self, table.features, column)
        return wrap_table(self, table.select_columns([column]), column, keep_text)

    def load(self) -> Any:
        """Load the table with all its columns."""
        raise NotImplementedError

    def advise(self, rows: TextRows | TextShards) -> str:
        return f'check column {self.section}.text_column = "{self.corpus.text_column}"'


def wrap_table(kind: SourceKind, table: Any, column: str, decode: Decode) -> TableRows | TableShards:
    """The rows of a loaded table, with random access or streamed."""
    if kind.corpus.streaming:
        return TableShards(table, column, decode, kind.option)
    return TableRows(table, column, decode)


def load_table(kind: SourceKind, builder: str, **options: Any) -> Any:
    """Call `datasets.load_dataset` silently, and report failures in one line.

    Raises:
        UserError: it fails.
    """
    import datasets

    datasets.disable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs failures that it also raises
    try:
        return datasets.load_dataset(builder, streaming=kind.corpus.streaming, **options)
    except Exception as error:  # the Hub client, the builders and Arrow raise many types
        raise UserError(_explain_failure(kind, error)) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def escape_all(paths: list[Path]) -> list[str]:
    """Escape paths, since `load_dataset` reads all paths as patterns."""
    return [glob.escape(str(path)) for path in paths]


def _expand_glob(pattern: str) -> list[Path]:
    """Paths that a pattern of `data_files` matches, sorted; `**` matches sub-folders."""
    # Unlike pathlib's glob, this accepts any string: one that cannot be a path matches nothing.
    return sorted(map(Path, glob.glob(os.path.expanduser(pattern.strip()), recursive=True)))


def _check_column(kind: SourceKind, features: datasets.Features, column: str) -> None:
    import datasets

    feature = features.get(column)
    if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string", "string_view"):
        found = f"is a column of {_describe_feature(feature)}, not of strings" if feature is not None else "is not a column"
        columns = ", ".join(f"{name} ({_describe_feature(each)})" for name, each in features.items())
        raise UserError(f'{kind.section}.text_column = "{column}" {found} of {kind.option}, which has: {columns}')


def _describe_feature(feature: object) -> str:
    import datasets

    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def find_reason(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def _explain_failure(kind: SourceKind, error: BaseException) -> str:
    reason = find_reason(error)
    if "corresponds to no data" in reason:  # load_dataset's message for a split without rows
        return explain_emptiness(kind)
    failure = f"{kind.option} cannot be loaded ({reason})"
    if isinstance(kind, FileKind):
        return f"{failure}: check {kind.files_option}"
    return (
        f"{failure}: check the name, {kind.section}.dataset_name, {kind.section}.dataset_split and the network, or read local "
        f"files as {FILE_KINDS}"
    )
