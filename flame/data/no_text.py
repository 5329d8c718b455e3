"""What to say where a source yields no text at all."""

from __future__ import annotations

from textwrap import shorten

from flame.data.sources import Source, StreamingSource, TableSource, parse_json_line

LONGEST_SHOWN_KEYS = 300


def explain_no_text(source: Source | StreamingSource, read: str) -> str:
    """The error line.

    Args:
        read: how much was looked at, such as "3 rows".
    """
    return f"{source.option} yields no usable text: {read} read, all empty, not text or undecodable: {_advise(source)}"


def _advise(source: Source | StreamingSource) -> str:
    if not isinstance(source, TableSource | StreamingSource):
        return "check the data"
    origin = source.origin
    column = f'{origin.section}.text_column = "{origin.corpus.text_column}"'
    match origin.corpus.dataset:
        case "text":
            return f"check {origin.files_option}"
        case "json":
            return _advise_on_keys(source, column)
        case _:
            return f"check column {column}"


def _advise_on_keys(source: TableSource | StreamingSource, column: str) -> str:
    origin = source.origin
    objects = [content for content in map(parse_json_line, source.read_first_cells()) if isinstance(content, dict)]
    keys = list(dict.fromkeys(key for content in objects for key in content))
    if not keys:
        return f"the first rows are no JSON objects: check {origin.files_option}"
    if origin.corpus.text_column in keys:
        return f"check what the rows hold as {column}"
    shown = shorten(", ".join(keys), LONGEST_SHOWN_KEYS, placeholder=" ...")
    return f"{column} is no key of the first rows, which have: {shown}; give the one that holds the text"
