"""Shared code of the sources that read files or use `datasets`. `datasets` and Arrow are imported when a source is opened."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from flame.config.addresses import is_remote
from flame.config.schema import JobConfig
from flame.data.sources.base import SourceKind, TextRows, TextShards, explain_emptiness
from flame.data.sources.cells import (
    CELL,
    CellReader,
    FileShards,
    TableRows,
    TableShards,
    datasets_silenced,
    find_reason,
    find_unreadable,
)
from flame.data.sources.contents import DECODERS, Content, Decode, classify_type, decode_dictionary, is_list
from flame.data.sources.files import find_missing, list_data_files
from flame.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

FILE_KINDS = '"text", "json", "csv", "parquet" or "arrow"'
"""For error lines."""
LONGEST_SHOWN_TYPE = 60


class FileKind(SourceKind):
    """A kind of source that reads files, here or at remote addresses."""

    def find_conflicts(self, job: JobConfig) -> Iterator[str]:
        yield from super().find_conflicts(job)
        if not self.corpus.data_files:
            yield f"{self.option} needs {self.section}.data_files (paths, folders or globs, separated by commas)"
        yield from find_missing(self.corpus.data_files, f"{self.section}.data_files")

    def list_files(self) -> list[str]:
        """The files that `data_files` names, in order, without duplicates.

        Raises:
            UserError: a remote address cannot be listed.
        """
        return list_data_files(self.corpus.data_files, f"{self.section}.data_files", self.suffixes)

    def list_content_files(self) -> list[str]:
        return self.list_files()

    def open_cells(self, files: list[str], reader: CellReader, decode: Decode, content: Content) -> TableRows | FileShards:
        """The cells of the files, with random access or streamed.

        Raises:
            UserError: a file cannot be read.
        """
        if self.corpus.streaming:
            return FileShards(files, reader, decode, self.option, content)
        from flame.data.sources.arrow_cache import copy_cells

        try:
            with datasets_silenced():
                return TableRows(copy_cells(files, reader), CELL, decode, content)
        except Exception as error:  # as in `load_table`
            raise UserError(explain_failure(self, error)) from error


class FileColumnKind(FileKind):
    """A kind of files with columns, of which `text_column` alone is read: others may differ from file to file."""

    def open(self) -> TableRows | FileShards:
        schemas: dict[str, pa.Schema] = {}
        files: list[str] = []
        for path in self.list_files():
            if self.corpus.streaming and is_remote(path) and schemas:
                files.append(path)  # asked when it is read
                continue
            try:
                schema, rows = self.examine(path)
            except Exception as error:
                raise UserError(explain_unreadable(self, path, error)) from error
            if rows != 0:
                files.append(path)
                schemas[path] = schema
        if not files:
            raise UserError(explain_emptiness(self))
        cell_type = self._unify(schemas)
        content = classify_type(cell_type)
        assert content is not None
        return self.open_cells(files, self.build_reader(cell_type), self.choose_decoder(content), content)

    def choose_decoder(self, content: Content) -> Decode:
        """What makes documents of the cells."""
        return DECODERS[content]

    def examine(self, path: str) -> tuple[pa.Schema, int | None]:
        """Columns of a file, and its rows if that is known without reading it. May raise anything."""
        raise NotImplementedError

    def build_reader(self, cell_type: pa.DataType) -> CellReader:
        raise NotImplementedError

    def _unify(self, schemas: dict[str, pa.Schema]) -> pa.DataType:
        """The type of the column in all files."""
        import pyarrow as pa

        column = self.corpus.text_column
        found: dict[pa.DataType, str] = {}
        for path, schema in schemas.items():
            check_column(self, schema, column, f'{self.option} ("{path}")', or_null=True)
            found.setdefault(decode_dictionary(schema.field(column).type), path)
        try:
            merged = pa.unify_schemas([pa.schema({column: each}) for each in found], promote_options="permissive")
        except pa.ArrowException:
            merged = None
        if merged is None or len({classify_type(each) for each in found} - {None}) > 1:
            shown = " and ".join(f'{_describe(each)} in "{path}"' for each, path in found.items())
            raise UserError(
                f'{self.section}.text_column = "{column}" of {self.option} is {shown}: it must be the same in all files'
            )
        check_column(self, merged, column, self.option)
        return merged.field(column).type

    def advise(self, rows: TextRows | TextShards) -> str:
        return f'check column {self.section}.text_column = "{self.corpus.text_column}"'


class ColumnKind(SourceKind):
    """A kind of source that `datasets` loads, whose documents are in the column `text_column`."""

    def open(self) -> TableRows | TableShards:
        table, column = self.load(), self.corpus.text_column
        if table.features is None:
            try:
                table = table._resolve_features()  # reads the first rows
            except Exception as error:  # as in `load_table`
                raise UserError(explain_failure(self, error)) from error
        schema = table.features.arrow_schema
        check_column(self, schema, column, self.option)
        content = classify_type(schema.field(column).type)
        assert content is not None
        chosen = table.select_columns([column])
        if self.corpus.streaming:
            return TableShards(chosen, column, DECODERS[content], self.option, content)
        return TableRows(chosen, column, DECODERS[content], content)

    def load(self) -> Any:
        """Load the table with all its columns."""
        raise NotImplementedError

    def advise(self, rows: TextRows | TextShards) -> str:
        return f'check column {self.section}.text_column = "{self.corpus.text_column}"'


def load_table(kind: SourceKind, builder: str, **options: Any) -> Any:
    """Call `datasets.load_dataset` silently, and report failures in one line.

    Raises:
        UserError: it fails.
    """
    import datasets

    try:
        with datasets_silenced():
            return datasets.load_dataset(builder, streaming=kind.corpus.streaming, **options)
    except Exception as error:  # the Hub client, the builders and Arrow raise many types
        raise UserError(explain_failure(kind, error)) from error


def check_column(kind: SourceKind, schema: pa.Schema, column: str, where: str, *, or_null: bool = False) -> None:
    """Check that a column can hold documents.

    Args:
        where: names what has the columns.
        or_null: it may also be without values.

    Raises:
        UserError: it does not exist, or has another type.
    """
    import pyarrow.types

    field = schema.field(column) if schema.names.count(column) == 1 else None
    if field is not None:
        cell_type = decode_dictionary(field.type)
        if classify_type(cell_type) or (or_null and pyarrow.types.is_null(cell_type)):
            return
        found = f"is a column of {_describe(cell_type)}, not of strings, lists of token ids or messages"
    else:
        found = "is not a column"
    columns = ", ".join(f"{each.name} ({_describe(each.type)})" for each in schema)
    raise UserError(f'{kind.section}.text_column = "{column}" {found} of {where}, which has: {columns}')


def _describe(cell_type: pa.DataType) -> str:
    return "List" if is_list(cell_type) else shorten(str(cell_type), LONGEST_SHOWN_TYPE, placeholder=" ...")


def explain_unreadable(kind: SourceKind, path: str, error: BaseException) -> str:
    """The error line for a file that cannot be read."""
    return (
        f'{kind.option} cannot be loaded: "{path}" cannot be read ({find_reason(error)}): replace it, or leave it out of '
        f"{kind.section}.data_files"
    )


def explain_failure(kind: SourceKind, error: BaseException) -> str:
    """The error line for a source that `datasets` cannot load."""
    if path := find_unreadable(error):
        return explain_unreadable(kind, path, error)
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
