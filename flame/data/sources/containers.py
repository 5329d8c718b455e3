"""Opens files for reading: compressed or not, here or at a remote address. The content decides, not the name.

A zip or tar archive is the files in it, of those a folder would be. `datasets` is not needed.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import PurePath
from typing import Any, BinaryIO

from flame.config.addresses import is_remote

COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip")
"""What may follow the suffix of a text file."""
BUFFER = 1 << 20
ZSTD_MARK, SKIPPABLE_MARK = b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
TAR_MARK, TAR_MARK_AT = b"ustar", 257
UNREAD = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar"}


def open_seekable(path: str) -> Any:
    """Open a file as it is, to be read at any place. Remote ones are read in blocks."""
    if not is_remote(path):
        import pyarrow as pa

        return pa.OSFile(path)
    import fsspec

    return fsspec.open(path, "rb").open()


def has_suffix(name: str, suffixes: Sequence[str]) -> bool:
    """Whether a name ends with one of the suffixes, or with one and that of a compression."""
    before, last = ["", "", *PurePath(name.lower()).suffixes][-2:]
    return last in suffixes or (last in COMPRESSION_SUFFIXES and before in suffixes)


def open_contents(path: str, suffixes: Sequence[str]) -> Iterator[tuple[str, BinaryIO]]:
    """Open what a file holds, decompressed, with its name: one stream, or one for each file of an archive, in the order of their
    names.

    Args:
        suffixes: of the files of an archive that are read. An archive of one file is that file, whatever its name.
    """
    with _open_stream(path) as file:
        yield from _open_any(file, path, suffixes)


def is_plain(path: str) -> bool:
    """Whether a file is here and holds its content as it is: neither compressed nor an archive."""
    if is_remote(path):
        return False
    try:
        with _open_stream(path) as file:
            return all(content is file for _, content in islice(_open_any(file, path, ()), 1))
    except Exception:  # reading it reports what is wrong
        return False


def _open_any(file: io.BufferedReader, name: str, suffixes: Sequence[str]) -> Iterator[tuple[str, BinaryIO]]:
    mark = file.peek(6)[:6]
    if mark in UNREAD:
        raise ValueError(f"it is a {UNREAD[mark]} archive, which is not read: unpack it")
    if mark.startswith(b"PK\x03\x04"):
        yield from _open_zip(file, suffixes)
        return
    if mark[1:4] == SKIPPABLE_MARK and 0x50 <= mark[0] < 0x60:
        mark = _find_mark_behind_skippable(file)
    for start, decompress in DECOMPRESS.items():
        if mark.startswith(start):
            yield from _open_tar_or_one(io.BufferedReader(decompress(file), BUFFER), name, suffixes)
            return
    yield from _open_tar_or_one(file, name, suffixes)


def _find_mark_behind_skippable(file: io.BufferedReader) -> bytes:
    """Both zstd and lz4 allow frames without data, with the same mark. The first frame with data tells; zstd if it is far."""
    head, at = file.peek(BUFFER), 0
    while head[at + 1 : at + 4] == SKIPPABLE_MARK and 0x50 <= head[at] < 0x60:
        at += 8 + int.from_bytes(head[at + 4 : at + 8], "little")
    return head[at : at + 4] if head[at : at + 4] in DECOMPRESS else ZSTD_MARK


def _open_stream(path: str) -> io.BufferedReader:
    if not is_remote(path):
        return io.BufferedReader(open(path, "rb", buffering=0), BUFFER)
    import fsspec

    # A web server need not know ranges: read its files from start to end.
    options = {"block_size": 0} if path.startswith("http") else {}
    return io.BufferedReader(_Unbuffered(fsspec.open(path, "rb", **options).open()), BUFFER)


class _Unbuffered(io.RawIOBase):
    """The least that `io.BufferedReader` needs, of a file-like object that has `read` alone."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open_with_arrow(codec: str) -> Callable[[BinaryIO], io.RawIOBase]:
    """Arrow brings these codecs, reads frame after frame, and notices a file that is cut off."""

    def decompress(file: BinaryIO) -> io.RawIOBase:
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec)

    return decompress


def _open_lzma(file: BinaryIO) -> lzma.LZMAFile:
    return lzma.LZMAFile(file)


DECOMPRESS: dict[bytes, Callable[[BinaryIO], io.RawIOBase]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),  # type: ignore[dict-item,return-value]
    b"BZh": lambda file: bz2.BZ2File(file),  # type: ignore[dict-item,return-value]
    b"\xfd7zXZ\x00": _open_lzma,  # type: ignore[dict-item]
    ZSTD_MARK: _open_with_arrow("zstd"),
    b"\x04\x22\x4d\x18": _open_with_arrow("lz4"),
}
"""By the first bytes of a file."""


def _open_zip(file: BinaryIO, suffixes: Sequence[str]) -> Iterator[tuple[str, BinaryIO]]:
    source = file if file.seekable() else io.BytesIO(file.read())
    with zipfile.ZipFile(source) as archive:
        for name in _choose_members([name for name in archive.namelist() if not name.endswith("/")], suffixes):
            with archive.open(name) as member:
                yield from _open_any(io.BufferedReader(member, BUFFER), name, suffixes)  # type: ignore[arg-type]


def _open_tar_or_one(file: io.BufferedReader, name: str, suffixes: Sequence[str]) -> Iterator[tuple[str, BinaryIO]]:
    if not file.peek(TAR_MARK_AT + len(TAR_MARK))[TAR_MARK_AT:].startswith(TAR_MARK):
        yield name, file
        return
    source = file if file.seekable() else io.BytesIO(file.read())
    with tarfile.open(fileobj=source, mode="r:") as archive:
        members = {member.name.removeprefix("./"): member for member in archive if member.isfile()}
        for inner in _choose_members(members, suffixes):
            extracted = archive.extractfile(members[inner])
            assert extracted is not None
            yield from _open_any(io.BufferedReader(extracted, BUFFER), inner, suffixes)  # type: ignore[arg-type]


def _choose_members(names: Iterable[str], suffixes: Sequence[str]) -> list[str]:
    """Names of the files of an archive that are read, in order.

    Raises:
        ValueError: it has files, but none with these suffixes.
    """
    shown = sorted(filter(_is_shown, names), key=_order_of_walk)
    chosen = [name for name in shown if has_suffix(name, suffixes)] if len(shown) > 1 else shown
    if shown and not chosen:
        raise ValueError(f"of the {len(shown)} files in it none ends with {' or '.join(suffixes)}")
    return chosen


def _is_shown(name: str) -> bool:
    return not any(part.startswith((".", "__")) for part in name.split("/"))


def _order_of_walk(name: str) -> list[tuple[bool, str]]:
    """Sorts the files of each folder before its sub-folders, as a walk through the unpacked archive meets them."""
    *folders, last = name.split("/")
    return [*((True, folder) for folder in folders), (False, last)]
