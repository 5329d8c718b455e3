"""`dataset = "tokens"`: documents as token ids. The run itself tokenizes nothing.

They are in a folder that flame-preprocess wrote (`flame.data.sources.token_folder`), or in files of other programs
(`flame.data.sources.token_files`).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn

from flame.config.addresses import is_remote
from flame.config.schema import JobConfig
from flame.data.sources.base import SourceKind
from flame.data.sources.containers import has_suffix
from flame.data.sources.files import find_missing, list_data_files, walk
from flame.data.sources.token_files import INDEX_SUFFIX, SUFFIXES, TokenFiles, open_token_files
from flame.data.sources.token_folder import MANIFEST_FILE, OFFSETS_FILE, TOKENS_FILE, TokenFolder, open_token_folder
from flame.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OWN_FILES = (MANIFEST_FILE, "progress.json", OFFSETS_FILE)
"""Any of them makes a folder one of ours, complete or not."""
SPLITS = {
    "train": "training",
    "training": "training",
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    "test": "test",
}
"""By what a file's path calls it."""


class Tokens(SourceKind):
    """A folder that flame-preprocess wrote, or token files of other programs. `data_files` names either."""

    name = "tokens"
    uses = frozenset({"data_files", "token_dtype", "end_of_text_id"})
    suffixes = SUFFIXES

    def find_conflicts(self, job: JobConfig) -> Iterator[str]:
        if not self.corpus.data_files:
            yield f"{self.option} needs {self.section}.data_files (a folder of flame-preprocess, or token files)"

    def open(self) -> NoReturn:
        raise AssertionError("a folder of tokens holds no text")

    def list_content_files(self) -> list[str]:
        folder = os.path.expanduser(self.corpus.data_files)
        return self._find_files(self.option) or [os.path.join(folder, name) for name in (TOKENS_FILE, OFFSETS_FILE)]

    def open_tokens(self, tokenizer: PreTrainedTokenizerFast) -> TokenFolder | TokenFiles:
        option, corpus = f"{self.option} ({self.files_option})", self.corpus
        paths = self._find_files(option)
        if paths is None:
            return open_token_folder(corpus.data_files, option, self.short_name, tokenizer)
        end_of_text = tokenizer.eos_token_id if corpus.end_of_text_id < 0 else corpus.end_of_text_id
        vocabulary_size = max(tokenizer.get_vocab().values()) + 1
        return open_token_files(paths, option, self.short_name, corpus.token_dtype, end_of_text, vocabulary_size)

    def _find_files(self, option: str) -> list[str] | None:
        """The token files of other programs; None if `data_files` is a folder of ours, or nothing."""
        path = os.path.expanduser(self.corpus.data_files)
        if os.path.isdir(path):
            if any(os.path.exists(os.path.join(path, name)) for name in OWN_FILES):
                return None
            if what := name_folder(path):
                raise UserError(f"{option}: folder {what}")
        elif not glob.has_magic(path) and "," not in path and not os.path.exists(path):
            return None
        key = f"{self.section}.data_files"
        if missing := list(find_missing(self.corpus.data_files, key)):
            raise UserError(*missing)
        found = list_data_files(self.corpus.data_files, key, SUFFIXES)
        if own := next(filter(_is_ours, found), None):
            raise UserError(
                f'{option}: "{own}" is in a folder of flame-preprocess, which is read as a whole: give that folder alone, and '
                "several such folders as [sources.NAME] each"
            )
        if os.path.isdir(path) and (splits := _choose_examples_of_splits(os.path.relpath(each, path) for each in found)):
            raise UserError(f"{option}: the folder holds several splits ({', '.join(splits)}): name the files of one")
        if remote := next((each for each in found if is_remote(each)), None):
            raise UserError(f'{option}: "{remote}": token files are mapped into memory, so they must be here: copy it')
        return found


def _is_ours(path: str) -> bool:
    """Whether a file here lies in a folder of flame-preprocess."""
    return not is_remote(path) and any(os.path.exists(os.path.join(os.path.dirname(path), name)) for name in OWN_FILES)


def _choose_examples_of_splits(paths: Iterable[str]) -> list[str]:
    """The first path of each split, if the paths are of several: the first word of a path that names a split says which."""
    first: dict[str, str] = {}
    for path in sorted(paths):
        named = [SPLITS[word] for word in re.split(r"[\W_]+", path.lower()) if word in SPLITS]
        if named:
            first.setdefault(named[0], path)
    return list(first.values()) if len(first) > 1 else []


def name_folder(folder: str) -> str:
    """What a folder is that holds no token files; empty if it may hold some."""
    names = sorted(os.listdir(folder))
    if {"dataset_info.json", "state.json"} <= {*names} or "dataset_dict.json" in names:
        return f'of save_to_disk: write dataset = "{folder}" without data_files'
    if any(name.endswith((".mds", ".mds.zstd")) for name in names):
        return "of MosaicML's StreamingDataset, which is not read: write its ids with numpy.ndarray.tofile"
    if "index.json" in names and any(name.startswith("chunk-") for name in names):
        return "of LitData, which is not read: write its ids with numpy.ndarray.tofile"
    if any(has_suffix(name, (*SUFFIXES, INDEX_SUFFIX)) for name in walk(folder)):
        return ""
    shown = f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else "nothing"
    return f'"{folder}" has no token files ({" or ".join(SUFFIXES)}) and no {MANIFEST_FILE} of flame-preprocess; it holds {shown}'
