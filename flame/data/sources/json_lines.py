"""`dataset = "json"`: JSON lines, one document per line."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from textwrap import shorten
from typing import Any

from flame.config.addresses import is_remote
from flame.data.sources.base import TextRows, TextShards, explain_emptiness
from flame.data.sources.cells import CellRows, FileShards, TableRows
from flame.data.sources.contents import DECODERS, Content, Decode, Document, classify_values, decode_text_cell
from flame.data.sources.line_files import LineRows, open_lines
from flame.data.sources.tables import FileKind
from flame.data.sources.text import Lines
from flame.errors import UserError

LONGEST_SHOWN_KEYS = 300
BYTE_ORDER_MARK = "\xef\xbb\xbf"
"""Of UTF-8, read as latin-1."""


class JsonLines(FileKind):
    """Files with one JSON object per line."""

    name = "json"
    uses = frozenset({"data_files", "text_column", "streaming"})
    suffixes = (".jsonl", ".json", ".ndjson")

    def open(self) -> LineRows | TableRows | FileShards:
        files = [path for path in self.list_files() if is_remote(path) or os.path.getsize(path)]
        if not files:
            raise UserError(explain_emptiness(self))
        key = self.corpus.text_column
        rows = self._open_lines(files, partial(decode_json_line, key=key))
        if _is_array(rows):
            raise UserError(
                f"{self.option} ({self.files_option}) is one JSON array: one JSON object a line is needed: write each element on "
                "a line of its own, as jq -c '.[]' does"
            )
        content = _find_content(rows, key)
        if content != "text":
            rows.decode_as(content, partial(decode_json_line, key=key, content=content))
        return rows

    def _open_lines(self, files: list[str], decode: Decode) -> LineRows | TableRows | FileShards:
        if not self.corpus.streaming and (lines := open_lines(files, decode)) is not None:
            return lines
        import pyarrow as pa

        return self.open_cells(files, Lines(pa.string(), self.suffixes), decode, "text")

    def advise(self, rows: TextRows | TextShards) -> str:
        assert isinstance(rows, CellRows)
        column = f'{self.section}.text_column = "{self.corpus.text_column}"'
        objects = [content for content in map(_parse_json_line, rows.list_first_cells()) if isinstance(content, dict)]
        keys = list(dict.fromkeys(key for content in objects for key in content))
        if not keys:
            return f"the first rows are no JSON objects: check {self.files_option}"
        if self.corpus.text_column in keys:
            return f"check what the rows hold as {column}"
        shown = shorten(", ".join(keys), LONGEST_SHOWN_KEYS, placeholder=" ...")
        return f"{column} is no key of the first rows, which have: {shown}; give the one that holds the text"


def decode_json_line(row: str, key: str, content: Content = "text") -> Document | None:
    """Return what is under `key` of a JSON line whose bytes were read as latin-1."""
    parsed = _parse_json_line(row)
    if not isinstance(parsed, dict):
        return None
    return decode_text_cell(parsed.get(key)) if content == "text" else DECODERS[content](parsed.get(key))


def _is_array(rows: CellRows) -> bool:
    """Whether the data is one JSON array and no JSON lines. A first row that is broken in another way is a bad row."""
    try:
        cells = filter(None, (cell.removeprefix(BYTE_ORDER_MARK).strip() for cell in rows.list_first_cells()))
        first = next(cells, "")
        if re.match(r"\[\s*(\{|$)", first) and _parse_json_line(first) is None:
            return True  # written over several lines
        return isinstance(_parse_json_line(first), list) and all(isinstance(_parse_json_line(cell), list) for cell in cells)
    except Exception:  # reading the rows reports it
        return False


def _find_content(rows: CellRows, key: str) -> Content:
    objects = filter(lambda parsed: isinstance(parsed, dict), map(_parse_json_line, rows.list_first_cells()))
    try:
        return classify_values(parsed.get(key) for parsed in objects)
    except Exception:  # reading the rows reports it
        return "text"


def _parse_json_line(row: str) -> Any:
    """Parse a JSON line whose bytes were read as latin-1; None if it is broken."""
    try:
        return json.loads(row.encode("latin-1").decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
