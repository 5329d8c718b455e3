"""Uploads exported folders.

`config.json` goes last, and is removed first from a folder that is replaced: a folder without it is incomplete and does not load.
The card goes before it, after the weights: until then an older card says whose the older ones are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

from flame.config.addresses import find_target_fault
from flame.errors import UserError
from flame.weights.card import CARD_FILE
from flame.weights.replacing import is_own_export, is_weights
from flame.weights.source import CONFIG_FILE

logger = logging.getLogger("flame")

NOTE_FILE = "uploads.json"
EXPORTS = re.compile(r"hf(-step-\d+)?")
LAST = (CARD_FILE, CONFIG_FILE)


def upload(label: str, folder: Path, address: str) -> None:
    """Upload an exported folder. Weights that an earlier export left there are removed: loaders would take them.

    Args:
        label: the option and its value, for messages.
        address: of the folder to write.

    Raises:
        UserError: it fails, or a model that is no export is there.
    """
    if fault := find_target_fault(address):
        raise UserError(f"{label}: {fault}")
    check_place(label, address)
    with _explained(label, f"{folder} cannot be uploaded to {address}"):
        _replace(*_open_place(address), folder)


def check_place(label: str, address: str) -> None:
    """Check that an export may take the place of what is at an address.

    Raises:
        UserError: it is a model that flame did not export, or it cannot be read.
    """
    with _explained(label, f"{address} cannot be read"):
        file_system, root = _open_place(address)
        is_own = is_own_export(_list_files(file_system, root), lambda name: file_system.open(f"{root}/{name}", "rb"))
    if not is_own:
        raise UserError(f"{label}: {address} holds a model that flame did not export: name another folder")


@contextmanager
def _explained(label: str, failure: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each file system has errors of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{label}: {failure} ({reason}): check the address and the right to write there") from error


def _open_place(address: str) -> tuple[Any, str]:
    """File system and path of an address."""
    import fsspec

    file_system, root = fsspec.core.url_to_fs(address)
    return file_system, root.rstrip("/")


def _list_files(file_system: Any, root: str) -> list[str]:
    return [name[len(root) :].strip("/") for name in file_system.find(root)] if file_system.exists(root) else []


def _replace(file_system: Any, root: str, folder: Path) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in sorted(_list_files(file_system, root), key=lambda name: name != CONFIG_FILE):
        if name == CONFIG_FILE or (is_weights(name) and name not in names):
            file_system.rm_file(f"{root}/{name}")
    for name in sorted(names, key=lambda name: LAST.index(name) if name in LAST else -1):
        target, size = f"{root}/{name}", (folder / name).stat().st_size
        file_system.makedirs(target.rpartition("/")[0], exist_ok=True)
        file_system.put_file(str(folder / name), target)
        file_system.invalidate_cache()
        if (arrived := file_system.info(target)["size"]) != size:
            raise OSError(f"{target} has {arrived} bytes instead of {size}")


class Uploader:
    """Uploads the exports of a run, one after the other, in a thread. What fails is a warning, and left for the next start.

    Args:
        folder: of the run. A note in it says what is uploaded.
        address: `checkpoint.export_to`.
    """

    def __init__(self, folder: Path, address: str):
        self._folder, self._address = folder, address.rstrip("/")
        self._label = f'checkpoint.export_to = "{address}"'
        self._names: Queue[str] = Queue()
        threading.Thread(target=self._run, name="upload", daemon=True).start()  # a stop does not wait for it

    def add(self, name: str) -> None:
        """Upload an export, unless it is there already as it is here."""
        self._names.put(name)

    def add_all(self) -> None:
        """Upload all exports that are not there."""
        for path in sorted(self._folder.iterdir()):
            if EXPORTS.fullmatch(path.name) and path.is_dir():
                self.add(path.name)

    def wait(self) -> None:
        """Wait until all are uploaded, or have failed."""
        self._names.join()

    def _run(self) -> None:
        while True:
            name = self._names.get()
            try:
                self._upload(name)
            except UserError as error:
                logger.warning("%s; the folder here stays, and the next start of this run tries again", error)
            except Exception:  # a fault here must not end the run
                logger.exception("%s: %s is not uploaded", self._label, name)
            finally:
                self._names.task_done()

    def _upload(self, name: str) -> None:
        target, state = f"{self._address}/{name}", _describe_state(self._folder / name)
        note = self._read_note()
        if note.get(name) == [target, state]:
            return
        upload(self._label, self._folder / name, target)
        part = self._folder / f"{NOTE_FILE}.part"
        part.write_text(json.dumps(note | {name: [target, state]}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self._folder / NOTE_FILE)
        logger.info("uploaded %s to %s", self._folder / name, target)

    def _read_note(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self._folder / NOTE_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}


def _describe_state(folder: Path) -> str:
    """What changes when an export is replaced."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    told = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
