"""`trainer.json`, the manifest of a checkpoint: the run's state, and size and digest of each other file.

A digest is XXH3-128, which no accident survives; it is no protection against an attacker. `digest` is that of the manifest
itself, so a value changed by hand is seen like a changed byte of a shard. Checkpoints of older releases have none.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from flame.checkpoints.fields import check_fields

logger = logging.getLogger("flame")

TRAINER_FILE = "trainer.json"
DIGESTS, OWN_DIGEST = "digests", "digest"
BLOCK_BYTES = 1 << 22


def digest_file(path: Path) -> str:
    """XXH3-128 of a file's content, as 32 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digests of files in a folder, by name."""
    return {name: digest_file(folder / name) for name in names}


def list_files(folder: Path) -> list[str]:
    """Names of all files in a folder and below, but the manifest, relative to it."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name != TRAINER_FILE]


def describe_files(folder: Path, digests: dict[str, str]) -> dict[str, Any]:
    """What the manifest says of the other files: `files`, sizes in bytes, and `digests`.

    Args:
        digests: those that are known; the others are computed.
    """
    names = list_files(folder)
    return {
        "files": {name: os.stat(folder / name).st_size for name in names},
        DIGESTS: {name: digests.get(name) or digest_file(folder / name) for name in names},
    }


def render(state: dict[str, Any]) -> bytes:
    """The content of a manifest, with its own digest."""
    return json.dumps(state | {OWN_DIGEST: _digest_state(state)}, indent=1).encode()


def _digest_state(state: dict[str, Any]) -> str:
    """Digest of what a state says, however it is written."""
    plain = json.loads(json.dumps({key: value for key, value in state.items() if key != OWN_DIGEST}))
    return xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read `trainer.json`, and check it, and that every file it lists exists with the listed size. Contents: `verify_files`.

    Raises:
        OSError: a file is missing or has another size.
        ValueError: `trainer.json` is truncated or changed, lacks a required key, or is of another step than its folder.
    """
    try:
        state = json.loads((checkpoint / TRAINER_FILE).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{TRAINER_FILE}: {error}") from error
    if not isinstance(state, dict) or not {"config", "files", "world_size"} <= state.keys():
        raise ValueError(f"{TRAINER_FILE} lacks the configuration, the number of ranks or the list of files")
    if (OWN_DIGEST in state) != (DIGESTS in state) or (OWN_DIGEST in state and state[OWN_DIGEST] != _digest_state(state)):
        raise ValueError(f"{TRAINER_FILE} has been changed since it was written (digest)")
    if fault := check_fields(state, is_signed=OWN_DIGEST in state):
        raise ValueError(f"{TRAINER_FILE}: {fault}")
    named = re.fullmatch(r"step-(\d+)", checkpoint.name)
    if named and int(named[1]) != state["step"]:
        raise ValueError(f"{TRAINER_FILE} is of step {state['step']}")
    for name, size in state["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f'{TRAINER_FILE} lists "{name}", which is not in this folder')
        found = (checkpoint / name).stat().st_size
        if found != size:
            raise OSError(f"{name} has {found} bytes instead of {size}")
    return state


def has_digests(state: dict[str, Any]) -> bool:
    """Whether the files of a checkpoint can be verified."""
    return DIGESTS in state


def warn_unverified(checkpoint: Path) -> None:
    """Say that a checkpoint has no digests."""
    logger.warning("checkpoint %s is of an older release, without digests: its files cannot be verified", checkpoint)


def verify_files(checkpoint: Path, state: dict[str, Any], share: int = 0, shares: int = 1) -> None:
    """Compare files with their digests.

    Args:
        state: the manifest, which has digests.
        share, shares: check the share-th of `shares` parts, so that ranks can divide the work.

    Raises:
        OSError: a file is missing.
        ValueError: a file has other bytes than were written.
    """
    largest_first = sorted(state[DIGESTS], key=lambda name: (-state["files"].get(name, 0), name))
    for name in largest_first[share::shares]:
        if digest_file(checkpoint / name) != state[DIGESTS][name]:
            raise ValueError(f"{name} has other bytes than were written (digest)")
