"""Which files `data_files` names: paths, globs, folders and remote addresses, separated by commas."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flame.config.addresses import is_remote
from flame.data.sources.containers import has_suffix
from flame.errors import UserError, give_reason


def split_patterns(data_files: str) -> list[str]:
    """The parts of `data_files`, without the empty ones."""
    return [pattern for part in data_files.split(",") if (pattern := part.strip())]


def find_missing(data_files: str, option: str) -> Iterator[str]:
    """Yield one line for each part of `data_files` that is nothing. What is in folders and at remote addresses is not asked.

    Args:
        option: such as "training.data_files".
    """
    for pattern in split_patterns(data_files):
        if not (is_remote(pattern) or _is_folder(pattern) or any(map(os.path.isfile, _expand_local(pattern, ())))):
            yield f'{option}: "{pattern}" matches no file'


def list_data_files(data_files: str, option: str, suffixes: Sequence[str]) -> list[str]:
    """The files, in order: absolute paths here, or remote addresses. A file that is named by several paths or links is listed
    once, by the first of them.

    Raises:
        UserError: a folder or a remote address has no file, or cannot be listed.
    """
    found: list[str] = []
    for pattern in split_patterns(data_files):
        if is_remote(pattern):
            found += _expand_remote(pattern, option, suffixes)
        else:
            here = [str(path.absolute()) for path in _expand_local(pattern, suffixes) if path.is_file()]
            if not here and _is_folder(pattern):
                ends = " or ".join(suffixes)
                raise UserError(f'{option}: "{pattern}" matches no file: of a folder, those that end with {ends} are read')
            found += here
    names: dict[str, str] = {}
    for name in found:  # by the name given: what a link leads to, as in a cache of the Hub, may lack the suffix
        names.setdefault(name if is_remote(name) else os.path.realpath(name), name)
    return list(names.values())


def describe_version(path: str) -> list[str]:
    """What tells a file from what it was before a change: path, size and time here; what the remote place says of it."""
    if is_remote(path):
        file_system, inner = _find_file_system(path)
        return [path, repr(sorted((str(key), str(value)) for key, value in file_system.info(inner).items()))]
    status = os.stat(path)
    return [path, str(status.st_size), str(status.st_mtime_ns)]


def find_size(path: str) -> int:
    """Bytes of a file; -1 if the remote place does not say."""
    if is_remote(path):
        file_system, inner = _find_file_system(path)
        return file_system.info(inner).get("size") or -1
    return os.stat(path).st_size


def _expand_local(pattern: str, suffixes: Sequence[str]) -> list[Path]:
    """Paths that a pattern matches, sorted; `**` matches sub-folders. A folder stands for its files with these suffixes."""
    path = os.path.expanduser(pattern)
    if _is_folder(pattern):
        return sorted(Path(found) for found in walk(path) if has_suffix(found, suffixes))
    # Unlike pathlib's glob, this accepts any string: one that cannot be a path matches nothing.
    return sorted(map(Path, glob.glob(path, recursive=True)))


def _is_folder(pattern: str) -> bool:
    try:
        return os.path.isdir(os.path.expanduser(pattern))
    except ValueError:  # no path at all
        return False


def walk(folder: str) -> Iterator[str]:
    """Files in a folder and its sub-folders, but hidden ones and those of caches."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        yield from (os.path.join(place, name) for name in names if not name.startswith((".", "__")))


def _find_file_system(path: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(path)


def _expand_remote(pattern: str, option: str, suffixes: Sequence[str]) -> list[str]:
    try:
        file_system, inner = _find_file_system(pattern)
        found = _list_remote(file_system, inner, suffixes)
        full = [pattern] if found == [inner] else [file_system.unstrip_protocol(path) for path in sorted(found)]
    except ImportError as error:
        raise UserError(f'{option}: "{pattern}" needs a package that is not installed ({error}): install it') from error
    except Exception as error:  # each file system has errors of its own
        reason = give_reason(error)
        raise UserError(f'{option}: "{pattern}" cannot be listed ({reason}): check the address and the access to it') from error
    if not full:
        raise UserError(f'{option}: "{pattern}" matches no file')
    return full


def _list_remote(file_system: Any, path: str, suffixes: Sequence[str]) -> list[str]:
    try:
        is_folder = file_system.info(path)["type"] == "directory"
    except FileNotFoundError:
        if not glob.has_magic(path):
            raise
        return [name for name, info in file_system.glob(path, detail=True).items() if info["type"] == "file"]
    if not is_folder:
        return [path]
    found = [name for name in file_system.find(path) if has_suffix(name, suffixes)]
    inside = [name[len(path) :].strip("/").split("/") for name in found]
    return [name for name, parts in zip(found, inside, strict=True) if not any(part.startswith((".", "__")) for part in parts)]
