"""`dataset = "json"`: JSON lines, one document per line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from flame.data.sources.base import TextRows, TextShards, is_encodable, keep_text
from flame.data.sources.tables import FileKind, TableRows, TableShards

LONGEST_SHOWN_KEYS = 300


class JsonLines(FileKind):
    """Files with one JSON object per line."""

    name = "json"
    uses = frozenset({"data_files", "text_column", "streaming"})
    suffixes = (".jsonl", ".json", ".ndjson")

    def open(self) -> TableRows | TableShards:
        files = self.list_filled_files(_count_bytes)
        return self.load_rows(files, "line", partial(decode_json_line, key=self.corpus.text_column))

    def advise(self, rows: TextRows | TextShards) -> str:
        assert isinstance(rows, TableRows | TableShards)
        column = f'{self.section}.text_column = "{self.corpus.text_column}"'
        objects = [content for content in map(_parse_json_line, rows.read_first_cells()) if isinstance(content, dict)]
        keys = list(dict.fromkeys(key for content in objects for key in content))
        if not keys:
            return f"the first rows are no JSON objects: check {self.files_option}"
        if self.corpus.text_column in keys:
            return f"check what the rows hold as {column}"
        shown = shorten(", ".join(keys), LONGEST_SHOWN_KEYS, placeholder=" ...")
        return f"{column} is no key of the first rows, which have: {shown}; give the one that holds the text"


def decode_json_line(row: str, key: str) -> str | None:
    """Return the text under `key` of a JSON line whose bytes were read as latin-1."""
    content = _parse_json_line(row)
    text = keep_text(content.get(key)) if isinstance(content, dict) else None
    return text if text is None or is_encodable(text) else None


def _parse_json_line(row: str) -> Any:
    """Parse a JSON line whose bytes were read as latin-1; None if it is broken."""
    try:
        return json.loads(row.encode("latin-1").decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _count_bytes(path: Path) -> int:
    return path.stat().st_size
