"""What an export takes the place of: an earlier export, and never somebody else's model or files.

The weights say who wrote them, in the headers of their files. Others who write weights into the same folder leave that out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from flame.checkpoints.files import sync_to_disk
from flame.checkpoints.storage import is_disk_full
from flame.errors import UserError
from flame.runtime.disk import replace
from flame.weights.card import CARD_FILE
from flame.weights.files import PRODUCER
from flame.weights.source import ASSETS, CONFIG_FILE, INDEX_FILE, MODULES_SUFFIX

WEIGHTS = "model*.safetensors"
EXPORTED = (
    *ASSETS,
    "added_tokens.json",
    "additional_chat_templates",
    WEIGHTS,
    INDEX_FILE,
    "*" + MODULES_SUFFIX,
    CARD_FILE,
)
"""Names in an export. Loaders would take them for the new model's, so they go with the replaced model."""
OLD_CARD = re.compile(rb"^Made with torch \S+, transformers \S+\.$", re.MULTILINE)
"""In the cards of exports from before weights said who wrote them."""
LONGEST_HEADER = 10**8
"""Bytes, by the definition of safetensors."""


def is_weights(name: str) -> bool:
    """Whether a file, named by its path in the folder of a model, holds weights that loaders take for the model's."""
    return "/" not in name and fnmatch(name, WEIGHTS)


def is_own_export(names: Collection[str], open_file: Callable[[str], BinaryIO]) -> bool:
    """Whether the model in a folder is an export of flame, or what a broken upload has left of one.

    Args:
        names: of its files, by their paths in it.
        open_file: opens one for reading.

    Raises:
        OSError: a file cannot be read.
    """
    weights = [name for name in names if is_weights(name)]
    if CONFIG_FILE in names and not weights:
        return False
    is_old = CARD_FILE in names and OLD_CARD.search(_read(open_file, CARD_FILE)) is not None
    for name in weights:
        metadata = _read_metadata(open_file, name)
        if metadata is None:
            if CONFIG_FILE in names:
                return False  # uploads remove it first, and write it last
        elif not (is_old or metadata.items() >= PRODUCER.items()):
            return False
    return True


def _read(open_file: Callable[[str], BinaryIO], name: str) -> bytes:
    with open_file(name) as file:
        return file.read()


def _read_metadata(open_file: Callable[[str], BinaryIO], name: str) -> dict[str, str] | None:
    """What the header of a safetensors file says beside its tensors; None for a file that is none."""
    with open_file(name) as file:
        size = int.from_bytes(file.read(8), "little")
        content = file.read(size) if size <= LONGEST_HEADER else b""
    try:
        return dict(json.loads(content).get("__metadata__", {}))
    except (ValueError, TypeError, AttributeError):
        return None


def check_replaceable(out: Path) -> None:
    """Check that an export may take the place of what is there.

    Raises:
        UserError: it is something else than an earlier export.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    advice = "which an export would replace: move it away, or name another folder"
    if not ((out / CONFIG_FILE).is_file() and any(out.glob(WEIGHTS))):
        raise UserError(f'"{out}" holds something else than an exported model, {advice}')
    is_own = False
    with suppress(OSError):  # what cannot be read stays
        is_own = is_own_export([path.name for path in out.iterdir()], lambda name: (out / name).open("rb"))
    if not is_own:
        raise UserError(f'"{out}" holds a model that flame did not export, {advice}')


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Yield a temporary folder, which replaces `out` after the block. After an error, `out` is unchanged.

    Files in `out` that are no part of an export are kept.

    Raises:
        UserError: see `check_replaceable`; or the folder cannot be written.
    """
    out = out.expanduser().resolve()  # follow links: they stay valid, and renaming stays on one disk
    check_replaceable(out)
    partial, old = (out.with_name(f"{out.name}.flame-export.{suffix}") for suffix in ("partial", "old.partial"))
    try:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        _make_folder(partial)
        yield partial
        for path in partial.rglob("*"):
            sync_to_disk(path)
        if out.exists():
            _keep_others(out, partial)
        sync_to_disk(partial)
        if out.exists():
            replace(out, old)
        replace(partial, out)
        sync_to_disk(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise UserError(f'the disk of "{out}" is full: free space and export again') from error
        if isinstance(error, PermissionError | NotADirectoryError):
            raise UserError(f'"{out}" cannot be written ({error.strerror}): name another folder') from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f'"{folder}" cannot be made ({error.strerror}): name another folder') from error


def _keep_others(out: Path, folder: Path) -> None:
    """Put what lies beside an earlier export into the folder of the next one."""
    for path in out.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in EXPORTED):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, folder / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, folder / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)
