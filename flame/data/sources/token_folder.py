"""The folders that flame-preprocess writes.

- `tokens.bin`: ids, little-endian uint16, or uint32 for a large vocabulary. Documents end to end, each ending with eos.
- `offsets.bin`: little-endian int64 [documents+1], boundaries of the documents in tokens, from 0 to the number of tokens.
- `labels.bin`, of chats whose answers are told apart: a byte a token, 1 if the assistant wrote it and else 0.
- `manifest.json`: written last. Its presence shows that the folder is complete.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import TypeAdapter

from flame.config.types import STRICT
from flame.data.encoding import Labelled, fingerprint_tokenizer
from flame.data.sources.index_cache import map_file
from flame.data.sources.token_index import Scan, TokenIndex, open_index, scan_tokens
from flame.errors import UserError, give_reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT_VERSION = 1
TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.bin"
LABELS_FILE = "labels.bin"
MANIFEST_FILE = "manifest.json"

OFFSET_DTYPE = np.dtype("<i8")
TokenDtype = Literal["uint16", "uint32"]
StoredLossOn = Literal["all", "assistant"]
TOKEN_DTYPES: dict[TokenDtype, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

SAME_COMMAND = "run the same flame-preprocess again"
NEW_FOLDER = "delete the folder and run flame-preprocess again"


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
    loss_on: StoredLossOn = "all"
    """"assistant": there are labels."""


class TokenFolder:
    """Random access to the documents of a folder. Pickled into worker processes, which map the files again."""

    def __init__(self, folder: Path, token_dtype: np.dtype, documents: int, option: str, name: str, has_labels: bool = False):
        self.name = name
        """Short name in logs, metrics and the audit."""
        self.option = option
        """Its name in error lines."""
        self.has_labels = has_labels
        """Whether it says what the assistant wrote."""
        self._folder, self._token_dtype, self._documents = folder, token_dtype, documents
        self._tokens: np.ndarray | None = None
        self._labels: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of documents."""
        return self._documents

    def measure(self) -> np.ndarray:
        """Tokens of each document, int64 [n]."""
        return np.diff(map_file(self._folder / OFFSETS_FILE, OFFSET_DTYPE)).astype(np.int64)

    def read(self, index: int) -> np.ndarray:
        """Return a document's token ids, uint16 or uint32 [n], n >= 1: a read-only view of the mapped file."""
        if self._tokens is None:
            self._map_files()
            assert self._tokens is not None
        offsets = self._offsets
        return self._tokens[offsets[index] : offsets[index + 1]]

    def read_labels(self, index: int) -> np.ndarray:
        """Which tokens of a document the assistant wrote, uint8 [n] of 0 and 1. Only if `has_labels`.

        Raises:
            UserError: the file is damaged.
        """
        if self._labels is None:
            self._labels = map_file(self._folder / LABELS_FILE, np.dtype("u1"))
        if self._tokens is None:
            self._map_files()
        labels = self._labels[self._offsets[index] : self._offsets[index + 1]]
        if labels.max() > 1:
            raise UserError(f'{self.option}: "{self._folder / LABELS_FILE}" is damaged: copy it again, or {NEW_FOLDER}')
        return labels

    def __reduce__(self) -> tuple[type[TokenFolder], tuple[Path, np.dtype, int, str, str, bool]]:
        return TokenFolder, (self._folder, self._token_dtype, self._documents, self.option, self.name, self.has_labels)

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
    has_labels = manifest.loss_on == "assistant"
    return TokenFolder(folder, TOKEN_DTYPES[manifest.dtype], manifest.documents, option, name, has_labels)


class LabelledFolder:
    """The documents of a folder with labels, which say which tokens count."""

    def __init__(self, folder: TokenFolder):
        assert folder.has_labels
        self.name, self.option, self.measure = folder.name, folder.option, folder.measure
        self._folder = folder

    def __len__(self) -> int:
        return len(self._folder)

    def read(self, index: int) -> Labelled:
        ends = np.flatnonzero(np.diff(self._folder.read_labels(index), prepend=0, append=0))
        return Labelled(self._folder.read(index), ends.reshape(-1, 2).astype(np.int64))

    def read_untokenized(self, index: int) -> np.ndarray:
        """int64 [n]: ids and labels in one number, by which a resumed run knows the document again."""
        return self._folder.read(index).astype(np.int64) * 2 + self._folder.read_labels(index)


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
        reason = give_reason(error, 200)
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
    if manifest.loss_on == "assistant":
        sizes[LABELS_FILE] = manifest.tokens
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
