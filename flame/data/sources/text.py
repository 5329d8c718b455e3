"""`dataset = "text"`: one document per file."""

from __future__ import annotations

from collections.abc import Iterator

from flame.config.schema import JobConfig
from flame.data.sources.base import TextRows, TextShards, keep_text
from flame.data.sources.tables import FileKind, TableRows, TableShards


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

    def open(self) -> TableRows | TableShards:
        return self.load_rows(self.list_files(), "document", decode_text)

    def advise(self, rows: TextRows | TextShards) -> str:
        return f"check {self.files_option}"


def decode_text(row: str) -> str | None:
    """Return the text of a row whose bytes were read as latin-1."""
    return keep_text(row.encode("latin-1").decode("utf-8"))
