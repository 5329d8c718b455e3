"""A folder that `datasets` wrote with `save_to_disk`, as the value of `dataset`. Its files are mapped as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flame.data.sources.base import SourceKind
from flame.data.sources.cells import FileShards, TableRows, find_reason
from flame.data.sources.contents import DECODERS, classify_type, decode_dictionary
from flame.data.sources.parquet import ArrowColumn
from flame.data.sources.tables import check_column
from flame.errors import UserError

SEVERAL, ONE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"
DEFAULT_SPLIT = "train"


def is_saved(folder: str) -> bool:
    """Whether this is a folder of `save_to_disk`, with one split or several."""
    path = os.path.expanduser(folder)
    return os.path.isfile(os.path.join(path, SEVERAL)) or all(os.path.isfile(os.path.join(path, name)) for name in (ONE, INFO))


def open_saved(kind: SourceKind) -> TableRows | FileShards:
    """Open the split of such a folder, with random access or one shard a file.

    Raises:
        UserError: there is no such split or column, or the folder is damaged.
    """
    try:
        folder = _choose_split(kind)
        files = _list_files(folder)
        table = None if kind.corpus.streaming else _map(folder)
        schema = table.features.arrow_schema if table is not None else _read_schema(files[0])
    except UserError:
        raise
    except Exception as error:  # a file is missing or damaged
        raise UserError(
            f"{kind.option} is a folder of save_to_disk that cannot be read ({find_reason(error)}): write it again"
        ) from error
    column = kind.corpus.text_column
    check_column(kind, schema, column, kind.option)
    cell_type = decode_dictionary(schema.field(column).type)
    content = classify_type(cell_type)
    assert content is not None
    if table is not None:
        return TableRows(table.select_columns([column]), column, DECODERS[content], content)
    return FileShards(files, ArrowColumn(cell_type, column), DECODERS[content], kind.option, content)


def list_saved_files(kind: SourceKind) -> list[str]:
    """The files of the split of such a folder that was opened."""
    return _list_files(_choose_split(kind))


def _list_files(folder: Path) -> list[str]:
    return [str(folder / each["filename"]) for each in _read_json(folder / ONE)["_data_files"]]


def _choose_split(kind: SourceKind) -> Path:
    folder, corpus = Path(os.path.expanduser(kind.corpus.dataset)).absolute(), kind.corpus
    if corpus.dataset_name:
        raise UserError(
            f'{kind.section}.dataset_name = "{corpus.dataset_name}": {kind.option} is a folder of save_to_disk, which has no '
            "configurations: leave it out"
        )
    if (folder / SEVERAL).is_file():
        splits = _read_json(folder / SEVERAL)["splits"]
        if corpus.dataset_split not in splits:
            raise UserError(
                f'{kind.section}.dataset_split = "{corpus.dataset_split}" is no split of {kind.option}, which has: '
                f"{', '.join(splits)}"
            )
        return folder / corpus.dataset_split
    own = _read_json(folder / ONE).get("_split") or DEFAULT_SPLIT
    if corpus.dataset_split not in (own, DEFAULT_SPLIT):
        raise UserError(
            f'{kind.section}.dataset_split = "{corpus.dataset_split}": {kind.option} is a folder of save_to_disk with one split: '
            "leave it out"
        )
    return folder


def _map(folder: Path) -> Any:
    import datasets

    # A format that was saved with it would make tensors of its cells, or leave the column out.
    return datasets.load_from_disk(str(folder), keep_in_memory=False).with_format(None)


def _read_schema(path: str) -> Any:
    import pyarrow as pa

    with pa.OSFile(path) as content:
        return pa.ipc.open_stream(content).schema


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
