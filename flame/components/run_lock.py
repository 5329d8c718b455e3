"""One run, one set of processes: two that write in the same folder would take each other's files for leftovers."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from flame.errors import UserError

LOCK_FILE = "run.lock"
PATIENCE_SECONDS = 20.0
"""The processes of a run that was just killed may take a moment to end."""

logger = logging.getLogger("flame")


def lock_run(folder: Path) -> IO[str]:
    """Claim a run's folder for as long as this process lives, or until the file is closed. A kill releases it too.

    Raises:
        UserError: another process holds it.
    """
    file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip()
            if time.monotonic() > deadline:
                raise UserError(
                    f'job.dump_folder = "{folder}" is in use by another run ({holder}): wait for it, end it, or choose '
                    "another folder"
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            logger.warning("%s cannot be locked: take care that no second run writes in it", folder)
            return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
