"""Copies the cells of files into a memory-mapped table of the `datasets` cache.

It imports `datasets`, so it is imported when a source is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow as pa
from datasets.builder import Key

from flame.data.sources.cells import CELL, READERS_VERSION, CellReader, read_cells
from flame.data.sources.files import describe_version


@dataclass
class CellsConfig(datasets.BuilderConfig):
    """What is copied."""

    files: list[str] = field(default_factory=list)
    reader: CellReader | None = None


class Cells(datasets.ArrowBasedBuilder):
    """A table of one column: the cells of all files, in order."""

    BUILDER_CONFIG_CLASS = CellsConfig

    def _info(self) -> datasets.DatasetInfo:
        schema = pa.schema({CELL: self.config.reader.cell_type})
        return datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={})]

    def _generate_tables(self) -> Iterator[tuple[Key, pa.Table]]:
        number = 0
        for path in self.config.files:
            for cells in read_cells(self.config.reader, path):
                yield Key(0, number), pa.table({CELL: cells})
                number += 1


def copy_cells(files: list[str], reader: CellReader) -> datasets.Dataset:
    """The table of all cells. It is made once for each state of the files."""
    told = "\n".join([READERS_VERSION, repr(reader), *(each for path in files for each in describe_version(path))])
    builder = Cells(config_id=hashlib.sha256(told.encode()).hexdigest()[:32], files=files, reader=reader)
    builder.download_and_prepare()
    table = builder.as_dataset(split="train")
    assert isinstance(table, datasets.Dataset)
    return table
