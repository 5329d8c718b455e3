"""`dataset = "tokens"`: documents as token ids, in a folder that flame-preprocess wrote. The run itself tokenizes nothing.

- `tokens.bin`: ids, little-endian uint16, or uint32 for a large vocabulary. Documents end to end, each ending with eos.
- `offsets.bin`: little-endian int64 [documents+1], boundaries of the documents in tokens, from 0 to the number of tokens.
- `manifest.json`: written last. Its presence shows that the folder is complete.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np
from pydantic import TypeAdapter

from flame.config.schema import JobConfig
from flame.config.types import STRICT
from flame.data.encoding import fingerprint_tokenizer
from flame.data.sources.base import SourceKind
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

SAME_COMMAND = "run the same flame-preprocess again"
NEW_FOLDER = "delete the folder and run flame-preprocess again"


class Tokens(SourceKind):
    """A folder that flame-preprocess wrote. `data_files` is its path."""

    name = "tokens"
    uses = frozenset({"data_files"})

    def find_conflicts(self, job: JobConfig) -> Iterator[str]:
        if not self.corpus.data_files:
            yield f"{self.option} needs {self.section}.data_files (a folder)"

    def open(self) -> NoReturn:
        raise AssertionError("a folder of tokens holds no text")

    def list_content_files(self) -> list[Path]:
        folder = Path(os.path.expanduser(self.corpus.data_files))
        return [folder / TOKENS_FILE, folder / OFFSETS_FILE]

    def open_tokens(self, tokenizer: PreTrainedTokenizerFast) -> TokenFolder:
        option = f"{self.option} ({self.files_option})"
        return open_token_folder(self.corpus.data_files, option, self.short_name, tokenizer)


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
        lengths = np.diff(_map_file(self._folder / OFFSETS_FILE, OFFSET_DTYPE))
        held_out = lengths[::holdout_every] if holdout_every else lengths[:0]
        return int(lengths.sum() - held_out.sum())

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
        self._offsets = _map_file(self._folder / OFFSETS_FILE, OFFSET_DTYPE).data
        self._tokens = _map_file(self._folder / TOKENS_FILE, self._token_dtype)


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
    """Why a run with this tokenizer cannot read the folder; None if it can. Reads only the first and last offset."""
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
    offsets = _map_file(folder / OFFSETS_FILE, OFFSET_DTYPE)
    if (offsets[0], offsets[-1]) != (0, manifest.tokens):
        return f'"{folder / OFFSETS_FILE}" runs from {offsets[0]} to {offsets[-1]}, not from 0 to {manifest.tokens}: {NEW_FOLDER}'
    if manifest.tokenizer_fingerprint != fingerprint_tokenizer(tokenizer):
        return (
            f'"{folder}" was made with --tokenizer_path {manifest.tokenizer}, which is another tokenizer than '
            f'model.tokenizer_path = "{tokenizer.name_or_path}": give the same, or preprocess the text with this one'
        )
    return None


def _map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """Map a file into memory as a read-only array, [n], n >= 1."""
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
