"""`dataset` is a name on the Hugging Face Hub, such as "owner/name", or a folder: of data files in the Hub's layout, or of
`save_to_disk`."""

from __future__ import annotations

import os
import re
from typing import Any

from flame.data.sources.cells import datasets_silenced
from flame.data.sources.containers import has_suffix
from flame.data.sources.files import walk
from flame.data.sources.saved import is_saved, list_saved_files, open_saved
from flame.data.sources.tables import FILE_KINDS, ColumnKind, load_table
from flame.data.sources.token_files import SUFFIXES
from flame.data.sources.tokens import OWN_FILES as TOKEN_FILES
from flame.errors import UserError

LONGEST_NAME = 96
FOLDER = "folder"
"""Stands for the path of a folder, which may be spelled otherwise or moved."""
DESCRIPTION_SUFFIX = ".md"


class HubDataset(ColumnKind):
    """A dataset of the Hub."""

    uses = frozenset({"dataset_name", "dataset_split", "text_column", "streaming"})

    @property
    def _own_identity(self) -> str:
        return FOLDER if self._folder else super()._own_identity

    @property
    def _folder(self) -> str:
        """The folder here that it is; empty for a dataset of the Hub."""
        folder = os.path.abspath(os.path.expanduser(self.corpus.dataset))
        return folder if os.path.isdir(folder) else ""

    def list_content_files(self) -> list[str]:
        if not self._folder or not self.corpus.streaming:
            return []
        return list_saved_files(self) if is_saved(self._folder) else self._list_files_of_split()

    def _list_files_of_split(self) -> list[str]:
        import datasets

        try:
            with datasets_silenced():
                found = datasets.load_dataset_builder(self._folder, name=self.corpus.dataset_name or None).config.data_files
            return [str(path) for path in found[self.corpus.dataset_split]]
        except Exception:  # of a part of a split, such as train[:10%]
            return sorted(path for path in walk(self._folder) if not path.endswith(DESCRIPTION_SUFFIX))

    def open(self) -> Any:
        folder = os.path.expanduser(self.corpus.dataset)
        if is_saved(folder):
            return open_saved(self)
        if os.path.isdir(folder) and any(name in TOKEN_FILES or has_suffix(name, SUFFIXES) for name in os.listdir(folder)):
            raise UserError(
                f'{self.option} is a folder of token ids: write {self.section}.dataset = "tokens" with {self.section}.data_files '
                f'= "{self.corpus.dataset}"'
            )
        return super().open()

    def load(self) -> Any:
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

        corpus = self.corpus
        if corpus.dataset in _PACKAGED_DATASETS_MODULES:  # would read files of the current folder; "pandas" even unpickles them
            raise UserError(
                f"{self.option} is a reader of the datasets library, not a dataset: give the name of a dataset, such as "
                f'"owner/name", or read local files as {FILE_KINDS}'
            )
        options: dict[str, Any] = {"name": corpus.dataset_name or None, "split": corpus.dataset_split}
        if self._is_parquet():
            try:
                # Others may differ from file to file.
                table = load_table(self, corpus.dataset, **options, columns=[corpus.text_column])
                if corpus.text_column in (table.features or ()):
                    return table
            except UserError:  # loading all columns says what is wrong
                pass
        return load_table(self, corpus.dataset, **options)

    def _is_parquet(self) -> bool:
        import datasets
        from datasets.packaged_modules.parquet.parquet import ParquetConfig

        try:
            with datasets_silenced():
                builder = datasets.load_dataset_builder(self.corpus.dataset, name=self.corpus.dataset_name or None)
        except Exception:  # loading reports it
            return False
        return isinstance(builder.config, ParquetConfig)


def is_possible_name(name: str) -> bool:
    """Whether this can be the name of a Hub dataset: `name` or `owner/name`, of letters, digits, `-`, `_` and `.`."""
    part = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    is_shaped = re.fullmatch(rf"(?:{part}/)?{part}", name, re.ASCII) is not None
    return is_shaped and len(name) <= LONGEST_NAME and "--" not in name and ".." not in name
