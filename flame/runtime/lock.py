"""A lock on the folder of a run. Two runs in one folder would delete each other's files."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from flame.errors import UserError

LOCK_FILE = "run.lock"
PATIENCE_SECONDS = 20.0
"""How long to wait for the lock: the processes of a killed run may take a moment to end."""

logger = logging.getLogger("flame")


def lock_run(folder: Path) -> IO[str]:
    """Lock a run's folder until the returned file is closed or this process ends, even if it is killed.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written to.
    """
    try:
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f'job.dump_folder = "{folder}" cannot be used: {LOCK_FILE} in it cannot be opened for writing ({error.strerror}): '
            "make it writable, or choose another folder"
        ) from error
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read(200).strip()
            if time.monotonic() > deadline:
                raise UserError(
                    f'job.dump_folder = "{folder}" is in use by another run ({holder}): wait for it, end it, or choose '
                    "another folder"
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            logger.warning("%s cannot be locked: make sure that no other run writes to it", folder)
            return file
    with suppress(OSError):  # a full disk, which is told by who needs it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file
