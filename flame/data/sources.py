"""Where documents come from: random access to the rows of a corpus, each a text or a bad row."""

from __future__ import annotations

import json
import logging
import sysconfig
from collections.abc import Callable
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from flame.config import LOCAL_FORMATS, STANDARD_LIBRARY, Training, expand_glob
from flame.errors import UserError


class Source(Protocol):
    """Random access to the rows of a corpus. Instances are pickled into the loader's worker processes."""

    name: str
    """What the user calls it: the value of `training.dataset`."""

    def __len__(self) -> int:
        """Rows, good and bad."""
        ...

    def read(self, index: int) -> str | None:
        """Return the text of a row, or None for a bad row (empty or only white space, not text, not UTF-8). Never raises."""
        ...


def open_source(training: Training) -> Source:
    """Open the corpus that `training.dataset` names.

    Raises:
        UserError: it cannot be found or read, or has no rows, or no column of text of the given name.
    """
    source = _open_unchecked(training)
    if len(source) == 0:
        raise UserError(_explain_emptiness(training))
    return source


def _open_unchecked(training: Training) -> Source:
    match training.dataset:
        case "stdlib":
            return FileSource(STANDARD_LIBRARY, _list_standard_library())
        case "text":
            rows = _load_raw_rows(training, _list_data_files(training), sample_by="document")
            return TableSource("text", rows, "text", decode_text)
        case "json":
            rows = _load_raw_rows(training, _list_filled_files(training, _count_bytes), sample_by="line")
            return TableSource("json", rows, "text", partial(decode_json_line, key=training.text_column))
        case "parquet":
            files = _escape_all(_list_filled_files(training, _count_parquet_rows))
            return _open_table(training, _load_table(training, "parquet", data_files=files, split="train"))
        case _:
            name, split = training.dataset_name or None, training.dataset_split
            return _open_table(training, _load_table(training, training.dataset, name=name, split=split))


class FileSource:
    """One document a file, read when it is asked for."""

    def __init__(self, name: str, paths: list[Path]):
        self.name = name
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> str | None:
        try:
            return keep_text(self._paths[index].read_bytes().decode("utf-8"))
        except (OSError, UnicodeDecodeError):
            return None


class TableSource:
    """One document a row of a memory-mapped table."""

    def __init__(self, name: str, table: datasets.Dataset, column: str, decode: Callable[[Any], str | None]):
        self.name = name
        self._table = table.select_columns([column])
        self._column = column
        self._decode = decode

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> str | None:
        try:
            return self._decode(self._table[index][self._column])
        except UnicodeDecodeError:  # Arrow does not check the bytes of its strings until one is read
            return None


def keep_text(value: object) -> str | None:
    """Return a value that is a usable text, else None."""
    return value if isinstance(value, str) and not value.isspace() and value else None


def decode_text(row: str) -> str | None:
    """Return the text of a row of bytes that were read as latin-1."""
    return keep_text(row.encode("latin-1").decode("utf-8"))


def decode_json_line(row: str, key: str) -> str | None:
    """Return the text under `key` of a JSON line whose bytes were read as latin-1."""
    try:
        content = json.loads(row.encode("latin-1").decode("utf-8-sig"))
        text = keep_text(content.get(key)) if isinstance(content, dict) else None
        if text is not None:
            text.encode("utf-8")  # "\ud800" is a string in JSON but half a character in Unicode: no tokenizer takes it
        return text
    except (ValueError, RecursionError):
        return None


def _list_standard_library() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.is_file())
    return [folder / name for name in names if not {"site-packages", "dist-packages"} & set(name.split("/"))]


def _list_data_files(training: Training) -> list[Path]:
    """Files that `training.data_files` stands for, in order, each once."""
    patterns = filter(None, training.data_files.split(","))
    paths = [path.absolute() for pattern in patterns for path in expand_glob(pattern) if path.is_file()]
    return list(dict.fromkeys(paths))


def _list_filled_files(training: Training, count_content: Callable[[Path], int]) -> list[Path]:
    """Leave out files that hold nothing: `load_dataset` fails on one of them before another."""
    files = [path for path in _list_data_files(training) if count_content(path)]
    if not files:
        raise UserError(_explain_emptiness(training))
    return files


def _count_bytes(path: Path) -> int:
    return path.stat().st_size


def _count_parquet_rows(path: Path) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException):
        return 1  # not empty but broken, which is for the loading to report


def _escape_all(paths: list[Path]) -> list[str]:
    """Write paths as patterns that match nothing else: `load_dataset` takes all paths for patterns."""
    return [escape(str(path)) for path in paths]


def _load_raw_rows(training: Training, files: list[Path], sample_by: str) -> datasets.Dataset:
    """Load text files with one character for one byte, so that a row which is not UTF-8 spoils itself and not the load.

    Line ends are the exception: reading in text mode turns CRLF and CR into LF.
    """
    features = datasets.Features({"text": datasets.Value("string")})
    options = {"encoding": "latin-1", "sample_by": sample_by, "features": features}
    return _load_table(training, "text", data_files=_escape_all(files), split="train", **options)


def _open_table(training: Training, table: datasets.Dataset) -> TableSource:
    column = training.text_column
    feature = table.features.get(column)
    if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string", "string_view"):
        found = "is not a column of strings" if feature is not None else "is not a column"
        columns = ", ".join(f"{name} ({_describe_feature(kind)})" for name, kind in table.features.items())
        raise UserError(
            f'training.text_column = "{column}" {found} of training.dataset = "{training.dataset}", which has: {columns}'
        )
    return TableSource(training.dataset, table, column, keep_text)


def _describe_feature(feature: object) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _load_table(training: Training, builder: str, **options: Any) -> datasets.Dataset:
    datasets.disable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs failures that it also raises
    try:
        return datasets.load_dataset(builder, **options)
    except Exception as error:  # the Hub client, the builders and Arrow each raise kinds of their own
        raise UserError(_explain_failure(training, error)) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _explain_emptiness(training: Training) -> str:
    files = f" (training.data_files = {training.data_files})" if training.data_files else ""
    return f'training.dataset = "{training.dataset}"{files} has no rows: give it data with at least one document'


def _explain_failure(training: Training, error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if "corresponds to no data" in reason:  # how load_dataset puts it that a split has no rows
        return _explain_emptiness(training)
    failure = f'training.dataset = "{training.dataset}" cannot be loaded ({reason})'
    if training.dataset in LOCAL_FORMATS:
        return f"{failure}: check training.data_files = {training.data_files}"
    return (
        f"{failure}: check the name, training.dataset_name, training.dataset_split and the network, "
        f"or read local files with one of {', '.join(LOCAL_FORMATS)}"
    )
