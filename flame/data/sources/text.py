"""`dataset = "text"`: one document per file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from flame.config.schema import JobConfig
from flame.data.sources.base import TextRows, TextShards
from flame.data.sources.cells import CellReader, FileShards, TableRows
from flame.data.sources.containers import open_contents
from flame.data.sources.contents import keep_text
from flame.data.sources.tables import FileKind

CHARACTERS_AT_ONCE = 10 << 20


class TextFiles(FileKind):
    """Text files, one document each."""

    name = "text"
    uses = frozenset({"data_files", "streaming"})
    suffixes = (".txt", ".md")

    def find_conflicts(self, job: JobConfig) -> Iterator[str]:
        yield from super().find_conflicts(job)
        every = job.validation.holdout_every
        if self.corpus.streaming and every and self.section != "validation":
            yield (
                f"{self.option} with streaming has one document a shard, from which validation.holdout_every = {every} cannot "
                "hold out some: set streaming = false, or give validation.dataset"
            )

    def open(self) -> TableRows | FileShards:
        import pyarrow as pa

        return self.open_cells(self.list_files(), WholeFiles(pa.string(), self.suffixes), decode_text, "text")

    def advise(self, rows: TextRows | TextShards) -> str:
        return f"check {self.files_option}"


@dataclass(frozen=True)
class WholeFiles(CellReader):
    """Each file is a cell. Its bytes are read as latin-1, one character each, so that one that is not UTF-8 affects no other.

    Line ends are not kept: reading in text mode turns CRLF and CR into LF.
    """

    suffixes: tuple[str, ...]
    """Of the files in an archive."""

    def read(self, path: str) -> Iterator:
        import pyarrow as pa

        for _, content in open_contents(path, self.suffixes):
            yield pa.array([io.TextIOWrapper(content, encoding="latin-1").read()], self.cell_type)


@dataclass(frozen=True)
class Lines(CellReader):
    """Each line is a cell, otherwise as `WholeFiles`."""

    suffixes: tuple[str, ...]

    def read(self, path: str) -> Iterator:
        import pyarrow as pa

        for _, content in open_contents(path, self.suffixes):
            text = io.TextIOWrapper(content, encoding="latin-1")
            while lines := text.readlines(CHARACTERS_AT_ONCE):
                yield pa.array([line.removesuffix("\n") for line in lines], self.cell_type)


def decode_text(row: str) -> str | None:
    """Return the text of a row whose bytes were read as latin-1. A byte order mark is no text."""
    return keep_text(row.encode("latin-1").decode("utf-8-sig"))
