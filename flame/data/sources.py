"""Where documents come from: the rows of a corpus, each a text or a bad row."""

from __future__ import annotations

import json
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from flame.config import GENERATED, LOCAL_FORMATS, PATHSTAR, Corpus, Generators
from flame.data.generated import GeneratedSource
from flame.data.pathstar import PathstarSource, parse_sizes
from flame.data.siblings import SiblingsSource
from flame.data_conflicts import expand_glob
from flame.errors import UserError

ROWS_AT_ONCE = 256  # of a streaming source


class Source(Protocol):
    """Random access to the rows of a corpus. Instances are pickled into the loader's worker processes."""

    name: str
    """Short name in logs, metrics and the audit."""
    option: str
    """How error lines name it, such as `training.dataset = "json"`."""

    def __len__(self) -> int:
        """Rows, good and bad."""
        ...

    def read(self, index: int) -> str | None:
        """Return the text of a row, or None for a bad row (empty or only white space, not text, not UTF-8). Never raises."""
        ...


@dataclass(frozen=True)
class Origin:
    """A corpus and the section of options that asked for it: "training", "validation" or "sources.NAME"."""

    corpus: Corpus
    section: str

    @property
    def name(self) -> str:
        return self.section.removeprefix("sources.") if self.section.startswith("sources.") else self.corpus.dataset

    @property
    def option(self) -> str:
        return f'{self.section}.dataset = "{self.corpus.dataset}"'

    @property
    def files_option(self) -> str:
        return f"{self.section}.data_files = {self.corpus.data_files}"


def open_source(corpus: Corpus, section: str, generators: Generators | None = None) -> Source | StreamingSource:
    """Open the text corpus that `{section}.dataset` names.

    Args:
        generators: options of generated datasets, where they may be asked for.

    Raises:
        UserError: it cannot be found or read, or has no rows, or no column of text of the given name.
    """
    origin = Origin(corpus, section)
    if corpus.dataset in GENERATED:
        if generators is None:
            raise UserError(f"{origin.option} is generated while a run trains: it cannot be read before")
        return _open_generated(origin, generators)
    if corpus.streaming:
        return _open_streaming(origin)
    source = _open_unchecked(origin)
    if len(source) == 0:
        raise UserError(_explain_emptiness(origin))
    return source


def _open_generated(origin: Origin, generators: Generators) -> GeneratedSource:
    """What is held out of a generated dataset where it is the corpus to validate on, all else where it is trained on."""
    is_held_out = origin.section == "validation"
    if origin.corpus.dataset == PATHSTAR:
        sizes = parse_sizes(origin.corpus.dataset_name)
        return PathstarSource(origin.name, origin.option, sizes, generators.pathstar, is_held_out)
    return SiblingsSource(origin.name, origin.option, generators.siblings, is_held_out)


def _open_unchecked(origin: Origin) -> Source:
    match origin.corpus.dataset:
        case "stdlib":
            return FileSource(origin, _list_standard_library())
        case "text" | "json":
            return TableSource(origin, _load_raw_rows(origin), "text", _choose_decoder(origin.corpus))
        case _:
            table = _load_table(origin)
            column = origin.corpus.text_column
            _check_column(origin, table.features, column)
            return TableSource(origin, table.select_columns([column]), column, keep_text)


def _open_streaming(origin: Origin) -> StreamingSource:
    if origin.corpus.dataset in ("text", "json"):
        return StreamingSource(origin, _load_raw_rows(origin), "text", _choose_decoder(origin.corpus))
    table = _load_table(origin)
    if table.features is None:
        try:
            table = table._resolve_features()  # reads the first rows
        except Exception as error:  # as in `_load`
            raise UserError(_explain_failure(origin, error)) from error
    column = origin.corpus.text_column
    _check_column(origin, table.features, column)
    return StreamingSource(origin, table.select_columns([column]), column, keep_text)


def _choose_decoder(corpus: Corpus) -> Callable[[Any], str | None]:
    return decode_text if corpus.dataset == "text" else partial(decode_json_line, key=corpus.text_column)


class FileSource:
    """One document a file, read when it is asked for."""

    def __init__(self, origin: Origin, paths: list[Path]):
        self.name, self.option = origin.name, origin.option
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

    def __init__(self, origin: Origin, table: datasets.Dataset, column: str, decode: Callable[[Any], str | None]):
        self.origin, self.name, self.option = origin, origin.name, origin.option
        self._table, self._column, self._decode = table, column, decode

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> str | None:
        try:
            return self._decode(self._table[index][self._column])
        except UnicodeDecodeError:  # Arrow does not check the bytes of its strings until one is read
            return None

    def read_first_cells(self) -> list[Any]:
        """Return undecoded cells, to say what is there."""
        return self._table[:ROWS_AT_ONCE][self._column]


class StreamingSource:
    """One document a row, which can only be read in order, in shards (files, mostly). Pickled like the others."""

    def __init__(self, origin: Origin, table: datasets.IterableDataset, column: str, decode: Callable[[Any], str | None]):
        self.origin, self.name, self.option = origin, origin.name, origin.option
        self._table, self._column, self._decode = table, column, decode
        self.num_shards = table.num_shards

    def read_shard(self, shard: int, row: int) -> Iterator[str | None]:
        """Yield the rows of a shard from the given one on, as `Source.read` returns them.

        Raises:
            UserError: the shard cannot be read.
        """
        # As tables of undecoded cells: rows before `row` cost little, and one bad row does not end the iteration.
        tables = self._table.shard(self.num_shards, shard).with_format("arrow").iter(ROWS_AT_ONCE)
        first = 0
        try:
            for table in tables:
                cells = table[self._column]
                for index in range(max(row - first, 0), len(cells)):
                    yield self._decode_cell(cells[index])
                first += len(cells)
        except Exception as error:  # the network, the file system, Arrow and the decompressors each raise kinds of their own
            raise UserError(
                f"{self.option}: shard {shard} of {self.num_shards} cannot be read after row {first} ({_find_reason(error)}): "
                "check the file or the network; the same command goes on from the last checkpoint"
            ) from error

    def read_first_cells(self) -> list[Any]:
        """Return undecoded cells, to say what is there."""
        tables = self._table.with_format("arrow").iter(ROWS_AT_ONCE)
        return next(iter(tables))[self._column].to_pylist()

    def _decode_cell(self, cell: pa.Scalar) -> str | None:
        try:
            return self._decode(cell.as_py())
        except UnicodeDecodeError:
            return None


def keep_text(value: object) -> str | None:
    """Return a value that is a usable text, else None."""
    return value if isinstance(value, str) and not value.isspace() and value else None


def decode_text(row: str) -> str | None:
    """Return the text of a row of bytes that were read as latin-1."""
    return keep_text(row.encode("latin-1").decode("utf-8"))


def decode_json_line(row: str, key: str) -> str | None:
    """Return the text under `key` of a JSON line whose bytes were read as latin-1."""
    content = parse_json_line(row)
    text = keep_text(content.get(key)) if isinstance(content, dict) else None
    return text if text is None or _is_encodable(text) else None


def parse_json_line(row: str) -> Any:
    """Return what a JSON line holds whose bytes were read as latin-1, None if it is broken."""
    try:
        return json.loads(row.encode("latin-1").decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _is_encodable(text: str) -> bool:
    """Whether it can be UTF-8: "\\ud800" is a string in JSON but half a character in Unicode, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _list_standard_library() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.is_file())
    return [folder / name for name in names if not {"site-packages", "dist-packages"} & set(name.split("/"))]


def _list_data_files(corpus: Corpus) -> list[Path]:
    """Files that `data_files` stands for, in order, each once."""
    patterns = filter(None, corpus.data_files.split(","))
    paths = [path.absolute() for pattern in patterns for path in expand_glob(pattern) if path.is_file()]
    return list(dict.fromkeys(paths))


def _list_filled_files(origin: Origin, count_content: Callable[[Path], int]) -> list[Path]:
    """Leave out files that hold nothing: `load_dataset` fails on one of them before another."""
    files = [path for path in _list_data_files(origin.corpus) if count_content(path)]
    if not files:
        raise UserError(_explain_emptiness(origin))
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


def _load_raw_rows(origin: Origin) -> Any:
    """Load text or JSON-line files with one character for one byte: a row that is not UTF-8 then spoils only itself.

    Line ends are the exception: reading in text mode turns CRLF and CR into LF.
    """
    is_text = origin.corpus.dataset == "text"
    files = _list_data_files(origin.corpus) if is_text else _list_filled_files(origin, _count_bytes)
    features = datasets.Features({"text": datasets.Value("string")})
    options = {"encoding": "latin-1", "sample_by": "document" if is_text else "line", "features": features}
    return _load(origin, "text", data_files=_escape_all(files), split="train", **options)


def _load_table(origin: Origin) -> Any:
    corpus = origin.corpus
    if corpus.dataset == "parquet":
        files = _escape_all(_list_filled_files(origin, _count_parquet_rows))
        return _load(origin, "parquet", data_files=files, split="train")
    if corpus.dataset in _PACKAGED_DATASETS_MODULES:  # would read whatever lies in the current folder, "pandas" by unpickling it
        raise UserError(
            f"{origin.option} is a reader of the datasets library, not a dataset: give the name of a dataset, or read local "
            f"files with one of {', '.join(LOCAL_FORMATS)}"
        )
    _refuse_saved_folder(origin)
    return _load(origin, corpus.dataset, name=corpus.dataset_name or None, split=corpus.dataset_split)


def _refuse_saved_folder(origin: Origin) -> None:
    corpus = origin.corpus
    marks = datasets.config.DATASET_STATE_JSON_FILENAME, datasets.config.DATASETDICT_JSON_FILENAME
    is_one, is_several = (os.path.isfile(os.path.join(corpus.dataset, mark)) for mark in marks)
    if is_one or is_several:
        split = f'["{corpus.dataset_split}"]' if is_several else ""
        raise UserError(
            f"{origin.option} is a folder of save_to_disk, which is not read: write it with "
            f'datasets.load_from_disk("{corpus.dataset}"){split}.to_parquet("NEW.parquet"), and give {origin.section}.dataset = '
            f'"parquet" with {origin.section}.data_files'
        )


def _check_column(origin: Origin, features: datasets.Features, column: str) -> None:
    feature = features.get(column)
    if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string", "string_view"):
        found = f"is a column of {_describe_feature(feature)}, not of strings" if feature is not None else "is not a column"
        columns = ", ".join(f"{name} ({_describe_feature(kind)})" for name, kind in features.items())
        fault = f'{origin.section}.text_column = "{column}" {found} of {origin.option}, which has: {columns}'
        raise UserError(fault)


def _describe_feature(feature: object) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _load(origin: Origin, builder: str, **options: Any) -> Any:
    datasets.disable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs failures that it also raises
    try:
        return datasets.load_dataset(builder, streaming=origin.corpus.streaming, **options)
    except Exception as error:  # the Hub client, the builders and Arrow each raise kinds of their own
        raise UserError(_explain_failure(origin, error)) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _explain_emptiness(origin: Origin) -> str:
    files = f" ({origin.files_option})" if origin.corpus.data_files else ""
    return f"{origin.option}{files} has no rows: give it data with at least one document"


def _find_reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def _explain_failure(origin: Origin, error: BaseException) -> str:
    reason = _find_reason(error)
    if "corresponds to no data" in reason:  # how load_dataset puts it that a split has no rows
        return _explain_emptiness(origin)
    failure = f"{origin.option} cannot be loaded ({reason})"
    if origin.corpus.dataset in LOCAL_FORMATS:
        return f"{failure}: check {origin.files_option}"
    return (
        f"{failure}: check the name, {origin.section}.dataset_name, {origin.section}.dataset_split and the network, "
        f"or read local files with one of {', '.join(LOCAL_FORMATS)}"
    )
