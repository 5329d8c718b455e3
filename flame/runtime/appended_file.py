"""A file that a run appends to for hours, while somebody may delete it."""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from flame.errors import MachineFault, UserError

logger = logging.getLogger("flame")


class AppendedFile:
    """Appends lines to a file. One that is deleted meanwhile is written anew, with the lines from before.

    Args:
        path: created if it does not exist.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("a+", encoding="utf-8")
        self._has_warned = False

    def write(self, line: str) -> None:
        """Append a line, without line end.

        Raises:
            MachineFault: the folder is gone.
            UserError: a link is in the file's place.
            OSError: it cannot be written.
        """
        self._follow()
        self._file.write(line + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk. Raises as `write`."""
        self._follow()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError, UserError):  # a full disk, or a folder that is gone, which is reported elsewhere
            self._follow()
        with suppress(OSError):
            self._file.close()

    def _follow(self) -> None:
        """Go on in the file that is there now."""
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            found = None
        own = os.fstat(self._file.fileno())
        if found is not None and (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino):
            return
        if not self.path.parent.is_dir():
            raise MachineFault(
                f'"{self.path.parent}" was deleted while the run was writing to it: stopped; the same command begins anew'
            )
        if found is not None and stat.S_ISLNK(found.st_mode):
            raise UserError(f'"{self.path}" was replaced by a link while the run was writing to it: move it away')
        before = ""
        if found is None:
            self._file.seek(0)
            before = self._file.read()
        new = self.path.open("a+", encoding="utf-8")
        new.write(before)
        self._file.close()
        self._file = new
        if not self._has_warned:
            self._has_warned = True
            what = "deleted: it is written anew" if found is None else "replaced: the run goes on in the new file"
            logger.warning('"%s" was %s', self.path, what)
