"""`dataset = "stdlib"`: the source files of Python's standard library on this machine, one document per file."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from flame.data.sources.base import SourceKind
from flame.data.sources.contents import keep_text


class StandardLibrary(SourceKind):
    """The source files of Python's standard library."""

    name = "stdlib"

    def open(self) -> Files:
        folder = Path(sysconfig.get_path("stdlib"))
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.is_file())
        return Files([folder / name for name in names if not {"site-packages", "dist-packages"} & set(name.split("/"))])


class Files:
    """One document per file. A file is read when its document is."""

    def __init__(self, paths: list[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> str | None:
        try:
            return keep_text(self._paths[index].read_bytes().decode("utf-8"))
        except (OSError, UnicodeDecodeError):
            return None
