"""Keeps what one pass over files found, so that later starts, other ranks and worker processes map it.

It lies in a cache beside that of `datasets`, under the paths, sizes and times of the files.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from flame.config.locations import find_cache_home
from flame.data.sources.files import describe_version

INDEX_DTYPE = np.dtype("<i8")


class KeptArray:
    """An array int64 [n], n >= 1, in memory or in a file of the cache. Then it is pickled as the path."""

    def __init__(self, content: np.ndarray | Path):
        self._content = content
        self._array: np.ndarray | None = None if isinstance(content, Path) else content

    def __reduce__(self) -> tuple[type[KeptArray], tuple[np.ndarray | Path]]:
        return KeptArray, (self._content,)

    @property
    def array(self) -> np.ndarray:
        if self._array is None:
            assert isinstance(self._content, Path)
            self._array = map_file(self._content, INDEX_DTYPE)
        return self._array


def find_index(told: Iterable[str], files: Iterable[str]) -> Path:
    """Where the index of these files, as they are now, is kept or is to be kept.

    Args:
        told: all that decides its content, beside the files.
        files: local paths.
    """
    name = hashlib.sha256("\n".join([*told, *map(_describe_state, files)]).encode()).hexdigest()[:32]
    return find_cache() / f"{name}.idx"


def keep_index(path: Path, content: np.ndarray) -> KeptArray:
    """Put an index, int64 [n], where `find_index` says. Where nothing can be written it stays in memory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content.view(np.uint8).data)
        os.replace(file.name, path)
    except OSError:  # each start reads the files again
        return KeptArray(content)
    return KeptArray(path)


def find_cache() -> Path:
    """Folder of the indices."""
    own = os.environ.get("HF_DATASETS_CACHE")
    return (Path(own).expanduser() if own else find_cache_home() / "datasets") / "flame_tokens"


def map_file(path: str | Path, dtype: np.dtype, start: int = 0, count: int = -1) -> np.ndarray:
    """Map a file into memory as a read-only array, [n], n >= 1.

    Args:
        start: first byte. count: how many; -1 takes all.
    """
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype, count, start)


def _describe_state(path: str) -> str:
    return "\n".join([*describe_version(path), str(os.stat(path).st_ctime_ns)])
