"""What a disk does wrong: renames that fail once, and errors in the words of a user."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path

from flame.errors import MachineFault, UserError

logger = logging.getLogger("flame")

PASSING = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EINTR)
"""Errors of network file systems that may be gone a moment later."""
ATTEMPTS, PAUSE_SECONDS = 4, 1.0

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
"""The file system is read-only, or the user may not write there."""
ELSEWISE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY)
"""Something else is there than the run has written."""
WORN = (*PASSING, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENXIO, errno.ENODEV)


def replace(source: Path, target: Path) -> None:
    """Rename, over what is there. Tried again where a network file system has failed for a moment.

    Raises:
        OSError: it fails still.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            os.replace(source, target)
            return
        except OSError as error:
            if attempt > 1 and error.errno == errno.ENOENT and not os.path.lexists(source) and os.path.lexists(target):
                return  # the attempt before was made, and only its answer was lost
            if error.errno not in PASSING or attempt == ATTEMPTS:
                raise
            logger.warning("%s cannot be renamed to %s (%s): trying again", source, target.name, error.strerror)
            time.sleep(PAUSE_SECONDS * attempt)


def explain(error: OSError, folder: Path) -> UserError | None:
    """An error of the disk in one line; None for an error that may be the program's own.

    Args:
        folder: of the run. Errors about files in it are the disk's, or come from somebody else's hand.
    """
    named = error.filename if isinstance(error.filename, str) else os.fspath(error.filename or folder)
    where = f'"{named}": {error.strerror or error}'
    if error.errno in CLOSED:
        return UserError(f"{where}: give the run a folder and files that it may use, and repeat the command")
    if error.errno in FULL:
        return UserError(f"{where}: free space, and repeat the command")
    is_inside = error.filename is not None and Path(os.path.abspath(named)).is_relative_to(os.path.abspath(folder))
    if error.errno in ELSEWISE and is_inside:
        return UserError(f"{where}: something else is there than this run has written: move it away, and repeat the command")
    if error.errno in WORN:
        return MachineFault(f"{where}: the machine failed: the same command goes on from the last checkpoint")
    return None
