"""Files of token ids that other programs wrote, mapped into memory as they are.

| file | dtype | documents |
|---|---|---|
| `.bin` of nanoGPT: ids alone | given, or by the size of the vocabulary | end at the end-of-text id |
| `.bin` of llm.c: 256 integers, then ids | in its header | end at the end-of-text id |
| `.bin` + `.idx` of Megatron | in the index | in the index |
| `.npy` of OLMo and Dolma: ids alone | given, or by the size of the vocabulary | end at the end-of-text id |
| `.npy` of NumPy | in its header | end at the end-of-text id |

What is none of these is named for what it is.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from flame.data.sources.index_cache import map_file
from flame.data.sources.token_index import Scan, TokenIndex, open_index, scan_tokens
from flame.errors import UserError

SUFFIXES = (".bin", ".npy")
INDEX_SUFFIX = ".idx"
RAW_KINDS = ("nanoGPT", "OLMo")
RAW_DTYPES = ("uint16", "uint32", "int32", "int64")
"""What `token_dtype` can be."""
SHORT_VOCABULARY = 1 << 16
"""Ids of a vocabulary up to this size fit uint16."""

MEGATRON_MARK = b"MMIDIDX\x00\x00"
OLD_MEGATRON_MARK = b"TNTIDX"
MEGATRON_HEADER = 34
"""Bytes: mark 9, version 8, dtype 1, sequences 8, boundaries of documents 8."""
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LLMC_MARKS = {20240520: "<u2", 20240801: "<u4"}
LLMC_HEADER = 1024

OTHERS = (
    (b"PAR1", 'a parquet file: write dataset = "parquet"'),
    (b"ARROW1", 'an Arrow file: write dataset = "arrow"'),
    (b"\xff\xff\xff\xff", 'an Arrow file: write dataset = "arrow"'),
    (b"\x1f\x8b\x08", "a gzip: unpack it, or read compressed text as what it is"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it, or read compressed text as what it is"),
    (b"PK\x03\x04", "a zip, as of PyTorch's weights or NumPy's .npz: give token ids"),
    (MEGATRON_MARK, "the index of a Megatron file: give the .bin beside it"),
    (b"\x89HDF", "an HDF5 file, which is not read"),
)
"""First bytes of files that are no token ids, and what they are."""
LONGEST_HEAD = 256


@dataclass(frozen=True)
class TokenFile:
    """Where the ids of a file are."""

    path: str
    kind: str
    """What wrote it, for error lines."""
    dtype: str
    start: int
    """First byte of the ids."""
    count: int
    is_guessed: bool = False
    """Whether nothing but the size of the vocabulary told the dtype."""

    @property
    def is_raw(self) -> bool:
        """Whether the file does not say its dtype itself."""
        return self.kind in RAW_KINDS

    def map_tokens(self) -> np.ndarray:
        """The ids, integers [count]: a read-only view of the file."""
        return map_file(Path(self.path), np.dtype(self.dtype), self.start, self.count)


class TokenFiles:
    """`Documents` of token files, one file after the other. Pickled into worker processes, which map the files again."""

    def __init__(self, files: list[TokenFile], indices: list[TokenIndex], end_of_text: int, option: str, name: str):
        self.option, self.name = option, name
        self._files, self._indices, self._end_of_text = files, indices, end_of_text
        self._starts = [0, *accumulate(len(index.offsets) - 1 for index in indices)]
        self._mapped: dict[int, tuple[np.ndarray, memoryview]] = {}

    def __reduce__(self) -> tuple:
        return TokenFiles, (self._files, self._indices, self._end_of_text, self.option, self.name)

    def __len__(self) -> int:
        return self._starts[-1]

    def measure(self) -> np.ndarray:
        """Tokens of each document, int64 [n]."""
        return np.concatenate([self._measure_file(number) for number in range(len(self._files))])

    def _measure_file(self, number: int) -> np.ndarray:
        """Lengths of the documents of a file, as `read` returns them."""
        file, offsets = self._files[number], np.asarray(self._indices[number].offsets)
        lengths = np.diff(offsets)
        if file.kind != "Megatron":
            return lengths
        return lengths + (file.map_tokens()[offsets[1:] - 1] != self._end_of_text)

    def read(self, index: int) -> np.ndarray:
        """Return a document's ids, integers [n], n >= 1: a view of the mapped file. Documents whose end is known from an index,
        and not from the id itself, get it if they lack it."""
        number = bisect_right(self._starts, index) - 1
        if number not in self._mapped:
            self._mapped[number] = self._files[number].map_tokens(), self._indices[number].offsets.data
        tokens, offsets = self._mapped[number]
        within = index - self._starts[number]
        document = tokens[offsets[within] : offsets[within + 1]]
        if self._files[number].kind == "Megatron" and document[-1] != self._end_of_text:
            return np.append(document.astype(np.int64), self._end_of_text)
        return document


def open_token_files(
    paths: list[str], option: str, name: str, token_dtype: str, end_of_text: int, vocabulary_size: int
) -> TokenFiles:
    """Open token files of other programs.

    Args:
        paths: at least one; an index stands for the file beside it.
        option: its name in error lines.
        name: short name in logs, metrics and the audit.
        token_dtype: of ids in files that do not say it; empty takes uint16 where the vocabulary fits, else uint32.
        end_of_text: id that ends each document.
        vocabulary_size: ids must be below it.

    Raises:
        UserError: a file is something else, is damaged, or holds ids outside the vocabulary or no end of a document.
    """
    files, indices = [], []
    for path in dict.fromkeys(_find_ids_of_index(path) for path in paths):
        try:
            file = examine_file(path, token_dtype, vocabulary_size)
            index, fault = _index_file(file, end_of_text, vocabulary_size)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f'{option}: "{path}" cannot be read as token ids ({reason})') from error
        if fault:
            raise UserError(f'{option}: "{path}" {fault}')
        files.append(file)
        indices.append(index)
    return TokenFiles(files, indices, end_of_text, option, name)


def examine_file(path: str, token_dtype: str, vocabulary_size: int) -> TokenFile:
    """Find out what a file is, by its first bytes and by what is beside it.

    Raises:
        ValueError: it holds no token ids; says what it is.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(LONGEST_HEAD)
    if size == 0:
        raise ValueError("it is empty")
    if head.startswith(b"\x93NUMPY"):
        return _agree(_examine_numpy(path), token_dtype)
    index = path.removesuffix(".bin") + INDEX_SUFFIX
    if path.endswith(".bin") and os.path.exists(index):
        dtype = _read_megatron_dtype(index)
        return _agree(_make_file(path, "Megatron", dtype, 0, size), token_dtype)
    mark, version = np.frombuffer(head[:8].ljust(8, b"\0"), dtype="<i4")
    if int(mark) in LLMC_MARKS and size >= LLMC_HEADER and 0 < version < 100:
        return _agree(_make_file(path, "llm.c", LLMC_MARKS[int(mark)], LLMC_HEADER, size), token_dtype)
    if what := name_other(path, head):
        raise ValueError(f"it is {what}")
    dtype = token_dtype or ("uint16" if vocabulary_size <= SHORT_VOCABULARY else "uint32")
    kind = "OLMo" if path.endswith(".npy") else "nanoGPT"
    return _make_file(path, kind, np.dtype(dtype).newbyteorder("<").str, 0, size, is_guessed=not token_dtype)


def name_other(path: str, head: bytes) -> str:
    """What a file is that holds no token ids, by its first bytes; empty if it may hold some."""
    for start, what in OTHERS:
        if head.startswith(start):
            return what
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() == b".":  # the mark at the end of each pickle
                return "a pickle, which is not read: write its ids with numpy.ndarray.tofile"
    if len(head) > 8 and all(0x20 <= byte < 0x7F or byte in b"\t\r\n" for byte in head):  # ids of two bytes or more are not
        return 'text: write dataset = "json", "text" or "csv"'
    return ""


def _make_file(path: str, kind: str, dtype: str, start: int, size: int, *, is_guessed: bool = False) -> TokenFile:
    width = np.dtype(dtype).itemsize
    count, rest = divmod(size - start, width)
    if rest or not count:
        how = "set token_dtype" if is_guessed else "copy it again"
        raise ValueError(f"a {kind} token file of {np.dtype(dtype).name}: its {size - start} bytes are not whole ids: {how}")
    return TokenFile(path, kind, dtype, start, count, is_guessed)


def _agree(file: TokenFile, token_dtype: str) -> TokenFile:
    """The file, unless the user says another dtype than it does itself."""
    own = np.dtype(file.dtype).name
    if token_dtype not in ("", own):
        raise ValueError(f"it is a {file.kind} token file that says {own} itself, and token_dtype is {token_dtype}: leave it out")
    return file


def _examine_numpy(path: str) -> TokenFile:
    with open(path, "rb") as file:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(file)
        if version not in read:
            raise ValueError(
                f"it is a NumPy file of format {version[0]}.{version[1]}, of arrays with named fields: token ids are one row of "
                "integers"
            )
        shape, _, dtype = read[version](file)
        start = file.tell()
    if dtype.kind not in "ui" or len(shape) != 1:
        raise ValueError(f"it is a NumPy array of {dtype} and shape {shape}: token ids are one row of integers")
    return _make_file(path, "NumPy", dtype.str, start, os.path.getsize(path))


def _find_ids_of_index(path: str) -> str:
    ids = path.removesuffix(INDEX_SUFFIX) + ".bin"
    return ids if path.endswith(INDEX_SUFFIX) and os.path.exists(ids) else path


def _read_megatron_dtype(index: str) -> str:
    with open(index, "rb") as file:
        head = file.read(MEGATRON_HEADER)
    if not head.startswith(MEGATRON_MARK) or len(head) < MEGATRON_HEADER:
        is_old = head.startswith(OLD_MEGATRON_MARK)
        what = "of an old Megatron, which is not read: convert it with a newer one" if is_old else "no Megatron index"
        raise ValueError(f'"{index}" beside it is {what}')
    if head[17] not in MEGATRON_DTYPES:
        raise ValueError(f'"{index}" has ids of code {head[17]}, which are no integers')
    return MEGATRON_DTYPES[head[17]]


def _read_megatron_offsets(index: str, file: TokenFile) -> np.ndarray:
    """Boundaries of the documents in tokens: int64 [documents+1]. Empty documents are left out."""
    with open(index, "rb") as content:
        head = content.read(MEGATRON_HEADER)
    sequences, boundaries = (int.from_bytes(head[at : at + 8], "little") for at in (18, 26))
    needed = MEGATRON_HEADER + 12 * sequences + 8 * boundaries
    if os.path.getsize(index) < needed:
        raise ValueError(f'"{index}" has {os.path.getsize(index)} bytes, but its header says {needed}: copy it again')
    lengths = np.fromfile(index, "<i4", sequences, offset=MEGATRON_HEADER).astype(np.int64)
    pointers = np.fromfile(index, "<i8", sequences, offset=MEGATRON_HEADER + 4 * sequences)
    documents = np.fromfile(index, "<i8", boundaries, offset=MEGATRON_HEADER + 12 * sequences)
    starts = np.concatenate([[0], lengths.cumsum()])
    if (lengths < 0).any() or (pointers != starts[:-1] * np.dtype(file.dtype).itemsize).any() or starts[-1] != file.count:
        raise ValueError(
            f'"{index}" is damaged, or of another file: its {starts[-1]} tokens are not the {file.count} of the file'
        )
    if not len(documents) or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise ValueError(f'"{index}" is damaged: the boundaries of its documents do not run from 0 to {sequences}')
    offsets = starts[documents]
    return offsets[np.append(np.diff(offsets) > 0, True)]


def _index_file(file: TokenFile, end_of_text: int, vocabulary_size: int) -> tuple[TokenIndex, str | None]:
    is_indexed = file.kind == "Megatron"
    index = file.path.removesuffix(".bin") + INDEX_SUFFIX

    def make() -> tuple[Scan, np.ndarray]:
        if is_indexed:
            offsets = _read_megatron_offsets(index, file)
            return scan_tokens(file.map_tokens()), offsets
        scan = scan_tokens(file.map_tokens(), end_of_text)
        after = scan.ends + 1
        rest = [] if len(after) and after[-1] == file.count else [file.count]
        return scan, np.concatenate([[0], after, rest]).astype(np.int64)

    def find_fault(index: TokenIndex) -> str | None:
        return _find_fault(file, index, end_of_text, vocabulary_size)

    return open_index([repr(file), str(end_of_text)], [file.path, *([index] if is_indexed else [])], make, find_fault)


def _find_fault(file: TokenFile, index: TokenIndex, end_of_text: int, vocabulary_size: int) -> str | None:
    """Why the ids cannot be trained on; None if they can."""
    what, dtype = f"is a {file.kind} token file", np.dtype(file.dtype)
    if file.is_raw and dtype.itemsize < 8 and file.count % 2 == 0 and index.is_every_second_zero:
        wider = '"uint32", or "int64" if it was written so' if dtype.itemsize == 2 else '"int64"'
        return f"{what} in which every second {dtype.name} is 0, as in wider ids: set token_dtype = {wider}"
    if index.smallest < 0 or index.largest >= vocabulary_size:
        wrong = index.smallest if index.smallest < 0 else index.largest
        advice = "give the tokenizer that made it, or set token_dtype" if file.is_guessed else "give the tokenizer that made it"
        return (
            f"{what} of {dtype.name} that holds the id {wrong}, but model.tokenizer_path has the ids 0 to {vocabulary_size - 1}: "
            f"{advice}"
        )
    if file.kind != "Megatron" and len(index.offsets) == 2 and file.map_tokens()[-1] != end_of_text:
        return (
            f"holds no end-of-text id {end_of_text}, so it would be one document: set end_of_text_id to the id that ends its "
            "documents; a file that is one text must be split by flame-preprocess or given as text"
        )
    return None
