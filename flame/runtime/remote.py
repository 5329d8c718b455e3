"""Copies files of a remote folder to this machine.

Each address has one folder in the cache. A file is copied when it is asked for and not here as it is there. Processes of a
machine take turns, so the first one copies and the others find the copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from flame.config.addresses import READ_ONLY, find_address_fault
from flame.config.locations import find_cache_home
from flame.errors import UserError, give_reason

logger = logging.getLogger("flame")

GIB = 2**30
STATE_FILE = ".state.json"
COPIES_AT_ONCE = 4
USUAL_NAMES = (
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "trainer.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
"""What is asked for at a web server, which need not list its files."""
VOLATILE = ("name", "url")
"""What a file system says of a file and is no sign of a change."""


def fetch(label: str, address: str, patterns: Iterable[str]) -> Path:
    """Copy the files of a remote folder that match the patterns, and return the folder here. What is here already is not copied
    again. What is no longer there is removed here.

    Args:
        label: the option and its value, for messages.
        patterns: of paths within the folder, as of `fnmatch`.

    Raises:
        UserError: a package is missing, the folder is not there or has nothing at all, or a copy fails.
    """
    if fault := find_address_fault(address):
        raise UserError(f"{label}: {fault}")
    folder = find_cache() / hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:32]
    try:
        with _locked(folder):
            _update(label, address.rstrip("/"), folder, list(patterns))
    except UserError:
        raise
    except Exception as error:  # each file system has errors of its own
        reason = give_reason(error)
        raise UserError(
            f"{label} cannot be copied to {folder} ({reason}): check the address, the access to it and the room on the disk"
        ) from error
    return folder


def find_cache() -> Path:
    """Folder of the copies, beside those of the Hub."""
    return find_cache_home() / "flame_remote"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        with suppress(OSError):  # a file system without locks: each process copies to a name of its own
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _update(label: str, address: str, folder: Path, patterns: list[str]) -> None:
    import fsspec

    file_system, root = fsspec.core.url_to_fs(address)
    root = root.rstrip("/")
    is_web = address.partition("://")[0] in READ_ONLY
    there = _ask_for_files(file_system, root, patterns) if is_web else _list_files(file_system, root)
    if not there:
        raise UserError(f"{label}: no such folder, or nothing in it: check the address and the access to it")
    known = _read_states(folder)
    wanted = {name for name in there if _matches(name, patterns)}
    seen = {name for name in known if not is_web or name in there or _matches(name, patterns)}
    old = {name for name in seen if name not in there or not _is_same(there[name], known[name], folder / name)}
    for name in old:
        del known[name]
        (folder / name).unlink(missing_ok=True)
    missing = sorted(wanted - known.keys())
    if old or missing:
        _write_states(folder, known)
    if not missing:
        return
    size = sum(there[name].get("size") or 0 for name in missing)
    files = "1 file" if len(missing) == 1 else f"{len(missing)} files"
    logger.info("%s: copying %s, %.2f GiB, to %s", label, files, size / GIB, folder)
    with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
        copies = {
            name: pool.submit(_copy, file_system, f"{root}/{name}", there[name].get("size"), folder / name) for name in missing
        }
    done = [name for name, copy in copies.items() if copy.exception() is None]
    _write_states(folder, known | {name: _describe(there[name]) for name in done})
    for copy in copies.values():
        copy.result()


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path matches one of the patterns, part by part."""
    return any(pattern.count("/") == name.count("/") and fnmatch(name, pattern) for pattern in patterns)


def _list_files(file_system: Any, root: str) -> dict[str, dict[str, Any]]:
    """What the file system says of each file of a folder, by its path within."""
    found = {name[len(root) :].strip("/"): info for name, info in file_system.find(root, detail=True).items()}
    return {name: info for name, info in found.items() if _is_inside(name)}


def _ask_for_files(file_system: Any, root: str, patterns: list[str]) -> dict[str, dict[str, Any]]:
    """As `_list_files` of a web server, for the files that match the patterns: those that it lists, if it does, and those that
    are usual."""
    try:
        listed = [name.removeprefix(root).strip("/") for name in file_system.find(root + "/")]
    except Exception:  # no list
        listed = []
    names = {*listed, *USUAL_NAMES, *(f"hf/{name}" for name in USUAL_NAMES), *(each for each in patterns if "*" not in each)}
    found, reason = {}, None
    for name in sorted(name for name in names if _matches(name, patterns) and _is_inside(name)):
        try:
            found[name] = file_system.info(f"{root}/{name}")
        except FileNotFoundError as error:
            reason = error.__cause__ or error
    if not found and reason is not None:
        raise reason
    return found


def _is_inside(name: str) -> bool:
    """Whether this is a path within a folder. Those of object stores can be anything."""
    return name != "" and ".." not in name.split("/")


def _describe(info: dict[str, Any]) -> str:
    """What changes when a file does."""
    return repr(sorted((str(key), str(value)) for key, value in info.items() if key not in VOLATILE))


def _is_same(info: dict[str, Any], known: str, copy: Path) -> bool:
    return _describe(info) == known and copy.exists() and info.get("size") in (None, copy.stat().st_size)


def _copy(file_system: Any, source: str, size: int | None, target: Path) -> None:
    """Copy a file. It gets its name when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        file_system.get_file(source, str(part))
        found = part.stat().st_size
        if size is not None and found != size:
            raise OSError(f"{source} has {size} bytes, and {found} came")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _read_states(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _write_states(folder: Path, states: dict[str, str]) -> None:
    part = folder / f"{STATE_FILE}.{os.getpid()}.part"
    part.write_text(json.dumps(states), encoding="utf-8")
    os.replace(part, folder / STATE_FILE)
