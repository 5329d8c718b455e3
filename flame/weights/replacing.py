"""What an export takes the place of: an earlier export of flame, and nothing else.

Every file in the folder must have the exact name of one that exports have, and weights must say in their headers that flame wrote
them. Others who write weights into the same folder leave that out. Anything else is rejected, so nothing has to be kept.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from flame.checkpoints.files import sync_to_disk
from flame.checkpoints.storage import is_disk_full
from flame.errors import UserError
from flame.runtime.disk import replace
from flame.weights.card import CARD_FILE
from flame.weights.files import PRODUCER
from flame.weights.source import CONFIG_FILE, INDEX_FILE, MODULES_SUFFIX

TEMPLATES = "additional_chat_templates"
PARTS = {
    CONFIG_FILE,
    "generation_config.json",
    INDEX_FILE,
    CARD_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    # vocabularies, as the tokenizers of transformers name them
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "spm_char.model",
    "bpe.codes",
}
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
HAS_HEADER = re.compile(rf"{WEIGHTS.pattern}|[^/]+{re.escape(MODULES_SUFFIX)}")
OTHER_PARTS = re.compile(rf"{TEMPLATES}/[^/]+\.jinja|tokenization_\w+\.py")
LONGEST_HEADER = 10**8
"""Bytes, by the definition of safetensors."""

Open = Callable[[str], BinaryIO]


def is_part(name: str) -> bool:
    """Whether a file, named by its path in a folder, is one that an export may have."""
    return name in PARTS or any(pattern.fullmatch(name) for pattern in (HAS_HEADER, OTHER_PARTS))


def find_foreign(names: Collection[str], open_file: Open, *, may_be_torn: bool = False) -> str | None:
    """What is in a folder that flame did not export; None if there is no such file.

    Args:
        names: of its files, by their paths in it.
        open_file: opens one for reading.
        may_be_torn: weights may be cut off.

    Raises:
        OSError: a file cannot be read.
    """
    for name in sorted(names):
        if not is_part(name):
            return f'holds "{name}", which is no part of an export'
        if HAS_HEADER.fullmatch(name):
            metadata = _read_metadata(open_file, name)
            if not (may_be_torn if metadata is None else metadata.items() >= PRODUCER.items()):
                return f'holds "{name}", which does not say that flame exported it'
    return None


def find_fault(names: Collection[str], open_file: Open) -> str | None:
    """Why a folder is no export of flame; None if it is one, or is empty. Arguments and errors are those of `find_foreign`."""
    if fault := find_foreign(names, open_file):
        return fault
    if names and not (CONFIG_FILE in names and any(WEIGHTS.fullmatch(name) for name in names)):
        return "holds something else than an exported model"
    return None


def _read_metadata(open_file: Open, name: str) -> dict[str, str] | None:
    """What the header of a safetensors file says beside its tensors; None for a file that is none."""
    with open_file(name) as file:
        size = int.from_bytes(file.read(8), "little")
        content = file.read(size) if size <= LONGEST_HEADER else b""
    try:
        return dict(json.loads(content).get("__metadata__", {}))
    except (ValueError, TypeError, AttributeError):
        return None


def list_parts(folder: Path) -> list[str]:
    """The files of an export in a folder, by their paths in it."""
    return [name for path, name in _list_entries(folder) if is_part(name) and path.is_file()]


def _list_entries(folder: Path) -> Iterator[tuple[Path, str]]:
    """What is in a folder, with the names by which exports are told. Foreign folders are not entered."""
    for path in sorted(folder.iterdir()):
        if path.name == TEMPLATES and path.is_dir() and not path.is_symlink():
            yield from ((each, f"{TEMPLATES}/{each.name}") for each in sorted(path.iterdir()))
        else:
            yield path, path.name


def _is_empty(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def check_replaceable(out: Path) -> None:
    """Check that an export may take the place of what is there.

    Raises:
        UserError: it is something else than an earlier export.
    """
    _check(out, find_fault)


def _check(folder: Path, find: Callable[[Collection[str], Open], str | None], named: Path | None = None) -> None:
    """Check what is in a folder, which the line may name otherwise."""
    try:
        fault = None if _is_empty(folder) else _find_here(folder, find)
    except OSError as error:  # what cannot be read stays
        fault = f"cannot be read ({error.strerror or error})"
    if fault:
        raise UserError(f'"{named or folder}" {fault}, and an export would delete it: move it away, or name another folder')


def _find_here(folder: Path, find: Callable[[Collection[str], Open], str | None]) -> str | None:
    if not folder.is_dir():
        return "is no folder"
    entries = list(_list_entries(folder))
    for path, name in entries:
        if is_part(name) and (path.is_symlink() or not path.is_file()):
            return f'holds "{name}", which is no part of an export'
    return find([name for _, name in entries], lambda name: (folder / name).open("rb"))


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Yield a temporary folder, which replaces `out` after the block. After an error, `out` is unchanged.

    Raises:
        UserError: see `check_replaceable`; or the folder cannot be written.
    """
    out = out.expanduser().resolve()  # follow links: they stay valid, and renaming stays on one disk
    partial, old = (out.with_name(f"{out.name}.flame-export.{suffix}") for suffix in ("partial", "old.partial"))
    try:
        _clear_up(out, old)
        shutil.rmtree(partial, ignore_errors=True)
        _make_folder(partial)
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync_to_disk(path)
        _exchange(partial, out, old)
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


def _clear_up(out: Path, old: Path) -> None:
    """Check what is there, after an export that was killed at its renames too: put back what it had not yet replaced, or delete
    the rest of it."""
    if old.exists() and _is_empty(out):
        replace(old, out)
    check_replaceable(out)
    if old.exists():
        _check(old, find_foreign)
        shutil.rmtree(old)


def _exchange(partial: Path, out: Path, old: Path) -> None:
    """Rename the export to its name, and delete the earlier one."""
    try:
        if out.exists():
            replace(out, old)
        _check(old, find_fault, named=out)  # others may have written into it since the start
        replace(partial, out)
    except BaseException:
        if old.exists() and not out.exists():
            replace(old, out)
        raise
    sync_to_disk(out.parent)
    shutil.rmtree(old, ignore_errors=True)
