"""Opens files for reading: compressed or not, here or at a remote address. The content decides, not the name.

A zip or tar archive is the files in it. `datasets` is not needed.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip")
"""What may follow the suffix of a text file."""
BUFFER = 1 << 20
TAR_MARK, TAR_MARK_AT = b"ustar", 257
UNREAD = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar"}


def is_remote(path: str) -> bool:
    """Whether this is an address that fsspec opens, such as `s3://bucket/file`."""
    return "://" in path


def open_seekable(path: str) -> Any:
    """Open a file as it is, to be read at any place. Remote ones are read in blocks."""
    if not is_remote(path):
        import pyarrow as pa

        return pa.OSFile(path)
    import fsspec

    return fsspec.open(path, "rb").open()


def open_contents(path: str) -> Iterator[BinaryIO]:
    """Open what a file holds, decompressed: one stream, or one for each file of an archive, in the order of their names."""
    with _open_stream(path) as file:
        mark = file.peek(6)[:6]
        if mark in UNREAD:
            raise ValueError(f"it is a {UNREAD[mark]} archive, which is not read: unpack it")
        if mark.startswith(b"PK\x03\x04"):
            yield from _open_zip(file)
            return
        for start, decompress in DECOMPRESS.items():
            if mark.startswith(start):
                yield from _open_tar_or_one(io.BufferedReader(decompress(file), BUFFER))
                return
        yield from _open_tar_or_one(file)


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
    b"\x28\xb5\x2f\xfd": _open_with_arrow("zstd"),
    b"\x04\x22\x4d\x18": _open_with_arrow("lz4"),
}
"""By the first bytes of a file."""


def _open_zip(file: BinaryIO) -> Iterator[BinaryIO]:
    source = file if file.seekable() else io.BytesIO(file.read())
    with zipfile.ZipFile(source) as archive:
        for name in sorted(filter(_is_shown, archive.namelist()), key=_order_of_walk):
            if not name.endswith("/"):
                with archive.open(name) as member:
                    yield member  # type: ignore[misc]


def _open_tar_or_one(file: io.BufferedReader) -> Iterator[BinaryIO]:
    if file.peek(TAR_MARK_AT + len(TAR_MARK))[TAR_MARK_AT:].startswith(TAR_MARK):
        source = file if file.seekable() else io.BytesIO(file.read())
        with tarfile.open(fileobj=source, mode="r:") as archive:
            members = {member.name.removeprefix("./"): member for member in archive if member.isfile()}
            for name in sorted(filter(_is_shown, members), key=_order_of_walk):
                extracted = archive.extractfile(members[name])
                assert extracted is not None
                yield extracted  # type: ignore[misc]
        return
    yield file


def _is_shown(name: str) -> bool:
    return not any(part.startswith((".", "__")) for part in name.split("/"))


def _order_of_walk(name: str) -> list[tuple[bool, str]]:
    """Sorts the files of each folder before its sub-folders, as a walk through the unpacked archive meets them."""
    *folders, last = name.split("/")
    return [*((True, folder) for folder in folders), (False, last)]
