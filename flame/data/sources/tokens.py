"""`dataset = "tokens"`: documents as token ids. The run itself tokenizes nothing.

They are in a folder that flame-preprocess wrote, below, or in files of other programs (`flame.data.sources.token_files`).

- `tokens.bin`: ids, little-endian uint16, or uint32 for a large vocabulary. Documents end to end, each ending with eos.
- `offsets.bin`: little-endian int64 [documents+1], boundaries of the documents in tokens, from 0 to the number of tokens.
- `manifest.json`: written last. Its presence shows that the folder is complete.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np
from pydantic import TypeAdapter

from flame.config.addresses import is_remote
from flame.config.schema import JobConfig
from flame.config.types import STRICT
from flame.data.encoding import fingerprint_tokenizer
from flame.data.sources.base import SourceKind
from flame.data.sources.containers import has_suffix
from flame.data.sources.files import find_missing, list_data_files, walk
from flame.data.sources.index_cache import map_file
from flame.data.sources.token_files import INDEX_SUFFIX, SUFFIXES, TokenFiles, open_token_files
from flame.data.sources.token_index import Scan, TokenIndex, open_index, scan_tokens, sum_lengths
from flame.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT_VERSION = 1
TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.bin"
MANIFEST_FILE = "manifest.json"

OFFSET_DTYPE = np.dtype("<i8")
TokenDtype = Literal["uint16", "uint32"]
TOKEN_DTYPES: dict[TokenDtype, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

OWN_FILES = (MANIFEST_FILE, "progress.json", OFFSETS_FILE)
"""Any of them makes a folder one of ours, complete or not."""
SPLITS = {
    "train": "training",
    "training": "training",
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    "test": "test",
}
"""By what a file's path calls it."""
SAME_COMMAND = "run the same flame-preprocess again"
NEW_FOLDER = "delete the folder and run flame-preprocess again"


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


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a complete folder, and what it was made from."""

    __pydantic_config__ = STRICT

    format_version: int
    dtype: TokenDtype
    documents: int
    tokens: int
    bad_rows: int
    """Rows without usable text, which were skipped."""
    tokenizer: str
    """The tokenizer's name as the user gave it."""
    tokenizer_fingerprint: str
    eos_id: int
    vocabulary_size: int
    dataset: str
    dataset_name: str
    dataset_split: str
    data_files: str
    text_column: str
    chat_template: str = ""
    """SHA-256 of what rendered chats; empty for other documents."""


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


class TokenFolder:
    """Random access to the documents of a folder. Pickled into worker processes, which map the files again."""

    def __init__(self, folder: Path, token_dtype: np.dtype, documents: int, option: str, name: str):
        self.name = name
        """Short name in logs, metrics and the audit."""
        self.option = option
        """Its name in error lines."""
        self._folder, self._token_dtype, self._documents = folder, token_dtype, documents
        self._tokens: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of documents."""
        return self._documents

    def count_tokens(self, holdout_every: int) -> int:
        """Tokens of all documents but every `holdout_every`-th, from the first on; 0 counts all."""
        return sum_lengths(np.diff(map_file(self._folder / OFFSETS_FILE, OFFSET_DTYPE)), holdout_every)

    def read(self, index: int) -> np.ndarray:
        """Return a document's token ids, uint16 or uint32 [n], n >= 1: a read-only view of the mapped file."""
        if self._tokens is None:
            self._map_files()
            assert self._tokens is not None
        offsets = self._offsets
        return self._tokens[offsets[index] : offsets[index + 1]]

    def __reduce__(self) -> tuple[type[TokenFolder], tuple[Path, np.dtype, int, str, str]]:
        return TokenFolder, (self._folder, self._token_dtype, self._documents, self.option, self.name)

    def _map_files(self) -> None:
        # Slicing np.memmap is ten times slower, and reading integers from a numpy array several times slower than a memoryview.
        self._offsets = map_file(self._folder / OFFSETS_FILE, OFFSET_DTYPE).data
        self._tokens = map_file(self._folder / TOKENS_FILE, self._token_dtype)


def open_token_folder(path: str, option: str, name: str, tokenizer: PreTrainedTokenizerFast) -> TokenFolder:
    """Open a folder of tokens for a run.

    Args:
        option: its name in error lines, such as `training.dataset = "tokens" (training.data_files = data/x)`.
        name: short name in logs, metrics and the audit.
        tokenizer: the run's tokenizer. The folder must have been made with the same one.

    Raises:
        UserError: it is missing, unfinished, damaged, of another version or made with another tokenizer.
    """
    folder = Path(os.path.expanduser(path)).absolute()
    try:
        manifest = read_manifest(folder)
        fault = _find_fault(folder, manifest, tokenizer)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None
    except OSError as error:
        fault = f'folder "{path}" cannot be read ({error.strerror})'
    if fault:
        raise UserError(f"{option}: {fault}")
    return TokenFolder(folder, TOKEN_DTYPES[manifest.dtype], manifest.documents, option, name)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a complete folder.

    Raises:
        UserError: there is no such folder, or no manifest of this format in it.
    """
    if not folder.is_dir():
        raise UserError(f'no such folder "{folder}": give the --out of flame-preprocess')
    path = folder / MANIFEST_FILE
    try:
        content = path.read_bytes()
        version = json.loads(content)["format_version"]
        if version == FORMAT_VERSION:
            return TypeAdapter(Manifest).validate_json(content)
    except FileNotFoundError:
        raise UserError(f'folder "{folder}" has no {MANIFEST_FILE}, so it is unfinished: {SAME_COMMAND}') from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f'"{path}" is damaged ({type(error).__name__}: {reason}): {NEW_FOLDER}') from error
    raise UserError(
        f'"{path}" has format_version = {json.dumps(version)[:20]}, but this version of the program reads {FORMAT_VERSION}: '
        f"{NEW_FOLDER}"
    )


def _find_fault(folder: Path, manifest: Manifest, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Why a run with this tokenizer cannot read the folder; None if it can.

    Reads all offsets, and once for each state of the files all ids.
    """
    sizes = {
        TOKENS_FILE: manifest.tokens * TOKEN_DTYPES[manifest.dtype].itemsize,
        OFFSETS_FILE: (manifest.documents + 1) * OFFSET_DTYPE.itemsize,
    }
    for file, size in sizes.items():
        found = (folder / file).stat().st_size if (folder / file).is_file() else "no"
        if found != size:
            return f'"{folder / file}" has {found} bytes, but {MANIFEST_FILE} says {size}: copy it again, or {NEW_FOLDER}'
    if not 0 < manifest.documents <= manifest.tokens:
        return f'"{folder}" has {manifest.documents} documents of {manifest.tokens} tokens: {NEW_FOLDER}'
    offsets = map_file(folder / OFFSETS_FILE, OFFSET_DTYPE)
    if (offsets[0], offsets[-1]) != (0, manifest.tokens):
        return f'"{folder / OFFSETS_FILE}" runs from {offsets[0]} to {offsets[-1]}, not from 0 to {manifest.tokens}: {NEW_FOLDER}'
    if manifest.tokenizer_fingerprint != fingerprint_tokenizer(tokenizer):
        return (
            f'"{folder}" was made with --tokenizer_path {manifest.tokenizer}, which is another tokenizer than '
            f'model.tokenizer_path = "{tokenizer.name_or_path}": give the same, or preprocess the text with this one'
        )
    steps = np.diff(offsets)
    if (steps <= 0).any():
        first = int((steps <= 0).argmax())
        return (
            f'"{folder / OFFSETS_FILE}" is damaged: offset {first + 1} is {offsets[first + 1]} after {offsets[first]}: copy it '
            f"again, or {NEW_FOLDER}"
        )
    return _find_wrong_ids(folder, manifest, offsets)


def _find_wrong_ids(folder: Path, manifest: Manifest, offsets: np.ndarray) -> str | None:
    files = [str(folder / name) for name in (TOKENS_FILE, OFFSETS_FILE)]

    def check() -> tuple[Scan, np.ndarray]:
        tokens = map_file(folder / TOKENS_FILE, TOKEN_DTYPES[manifest.dtype])
        wrong_ends = np.flatnonzero(tokens[offsets[1:] - 1] != manifest.eos_id)
        return scan_tokens(tokens), wrong_ends[:1]

    def find_fault(index: TokenIndex) -> str | None:
        if index.largest >= manifest.vocabulary_size:
            return (
                f'"{files[0]}" is damaged: it holds the id {index.largest}, and the tokenizer has {manifest.vocabulary_size}: '
                f"copy it again, or {NEW_FOLDER}"
            )
        if len(index.offsets):
            number = int(index.offsets[0])
            return (
                f'"{folder}" is damaged: document {number} does not end with the end-of-text id: copy it again, or {NEW_FOLDER}'
            )
        return None

    return open_index([manifest.dtype, str(manifest.eos_id)], files, check, find_fault)[1]
