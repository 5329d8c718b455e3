"""`dataset` is a name on the Hugging Face Hub, such as "owner/name", or a folder: of data files in the Hub's layout, or of
`save_to_disk`."""

from __future__ import annotations

import re
from typing import Any

from flame.data.sources.saved import is_saved, open_saved
from flame.data.sources.tables import FILE_KINDS, ColumnKind, load_table
from flame.errors import UserError

LONGEST_NAME = 96


class HubDataset(ColumnKind):
    """A dataset of the Hub."""

    uses = frozenset({"dataset_name", "dataset_split", "text_column", "streaming"})

    def open(self) -> Any:
        return open_saved(self) if is_saved(self.corpus.dataset) else super().open()

    def load(self) -> Any:
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

        corpus = self.corpus
        if corpus.dataset in _PACKAGED_DATASETS_MODULES:  # would read files of the current folder; "pandas" even unpickles them
            raise UserError(
                f"{self.option} is a reader of the datasets library, not a dataset: give the name of a dataset, such as "
                f'"owner/name", or read local files as {FILE_KINDS}'
            )
        return load_table(self, corpus.dataset, name=corpus.dataset_name or None, split=corpus.dataset_split)


def is_possible_name(name: str) -> bool:
    """Whether this can be the name of a Hub dataset: `name` or `owner/name`, of letters, digits, `-`, `_` and `.`."""
    part = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    is_shaped = re.fullmatch(rf"(?:{part}/)?{part}", name, re.ASCII) is not None
    return is_shaped and len(name) <= LONGEST_NAME and "--" not in name and ".." not in name
