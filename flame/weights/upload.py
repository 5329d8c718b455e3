"""Uploads exported folders.

`config.json` goes last, and is removed first from a folder that is replaced: a folder without it is incomplete and does not load.
A mark is there while an upload is under way. After a broken upload it says that flame wrote the rest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

from flame.config.addresses import find_target_fault
from flame.errors import UserError
from flame.weights.replacing import find_fault, find_foreign, list_parts
from flame.weights.source import CONFIG_FILE

logger = logging.getLogger("flame")

NOTE_FILE = "uploads.json"
EXPORTS = re.compile(r"hf(-step-\d+)?")
MARK_FILE = "flame-upload.partial"


def upload(label: str, folder: Path, address: str) -> None:
    """Upload the files of an export. Those that an earlier export left there are removed: loaders would take them.

    Args:
        label: the option and its value, for messages.
        address: of the folder to write.

    Raises:
        UserError: it fails, or something else than an export of flame is there.
    """
    if fault := find_target_fault(address):
        raise UserError(f"{label}: {fault}")
    check_place(label, address)
    with _explained(label, f"{folder} cannot be uploaded to {address}"):
        _replace(*_open_place(address), folder)


def check_place(label: str, address: str) -> None:
    """Check that an export may take the place of what is at an address.

    Raises:
        UserError: something else than an export of flame is there, or it cannot be read.
    """
    if fault := _find_fault(label, address):
        raise UserError(fault)


def _find_fault(label: str, address: str) -> str | None:
    """The line for an address that holds something else than an export of flame, or than what a broken upload has left of one."""
    with _explained(label, f"{address} cannot be read"):
        file_system, root = _open_place(address)
        names = _list_files(file_system, root)

        def open_file(name: str) -> Any:
            return file_system.open(f"{root}/{name}", "rb")

        if MARK_FILE in names:
            fault = find_foreign([name for name in names if name != MARK_FILE], open_file, may_be_torn=True)
        else:
            fault = find_fault(names, open_file)
    return fault and f"{label}: {address} {fault}, and an export would delete it: move it away, or name another address"


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
    file_system.invalidate_cache()  # others write there too
    found = file_system.find(root) if file_system.exists(root) else []
    return [name for path in found if (name := path[len(root) :].strip("/"))]


def _replace(file_system: Any, root: str, folder: Path) -> None:
    names = list_parts(folder)
    file_system.makedirs(root, exist_ok=True)
    file_system.pipe_file(f"{root}/{MARK_FILE}", b"flame is uploading an export, or was interrupted\n")
    for name in sorted(_list_files(file_system, root), key=lambda name: name != CONFIG_FILE):
        if name == CONFIG_FILE or name not in (*names, MARK_FILE):
            file_system.rm_file(f"{root}/{name}")
    for name in sorted(names, key=lambda name: name == CONFIG_FILE):
        target, size = f"{root}/{name}", (folder / name).stat().st_size
        file_system.makedirs(target.rpartition("/")[0], exist_ok=True)
        file_system.put_file(str(folder / name), target)
        file_system.invalidate_cache()
        if (arrived := file_system.info(target)["size"]) != size:
            raise OSError(f"{target} has {arrived} bytes instead of {size}")
    file_system.rm_file(f"{root}/{MARK_FILE}")


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

    def check(self, is_written: Callable[[str], bool]) -> None:
        """Check, before training, that the uploads may take the place of what is at the address. One that cannot be read is a
        warning, as later.

        Args:
            is_written: whether the run will upload a folder of this name.

        Raises:
            UserError: something else than an export of flame is there.
        """
        try:
            with _explained(self._label, f"{self._address} cannot be read"):
                file_system, root = _open_place(self._address)
                names = {name.partition("/")[0] for name in _list_files(file_system, root)}
            faults = [_find_fault(self._label, f"{self._address}/{name}") for name in sorted(names) if is_written(name)]
        except UserError as error:
            logger.warning("%s", error)
            return
        if found := next(filter(None, faults), None):
            raise UserError(found)

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
    found = {name: (folder / name).stat() for name in list_parts(folder)}
    told = [(name, state.st_size, state.st_mtime_ns) for name, state in found.items()]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
