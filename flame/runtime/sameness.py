"""Compares what ranks have before they work together. Ranks that differ would compute something else in silence."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flame.errors import UserError

MOST_SHOWN = 8
LONGEST_VALUE = 80
PIECE_BYTES = 1 << 16

ADVICE = "start the same command, with the same code and files, on all machines"


def check_same(values: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Check that values are the same on all ranks. All ranks call it.

    Args:
        values: JSON-serializable, by the name that a difference is reported by. Names that a rank lacks are not compared with it.

    Raises:
        UserError: on all ranks, in one line: what differs, with the values, ranks and hosts.
    """
    texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}
    digest = sha256(json.dumps(texts, sort_keys=True).encode()).digest()
    digests: list[bytes] = [b""] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest, group=group)
    if len(set(digests)) == 1:
        return
    gathered: list[tuple[str, dict[str, str]]] = [("", {})] * len(digests)
    dist.all_gather_object(gathered, (socket.gethostname(), texts), group=group)
    if differences := list_differences(gathered):
        raise UserError("; ".join(differences) + f": {ADVICE}")


def list_differences(gathered: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """What differs, such as `optimizer.lr is 0.001 on rank 0 (a), 0.005 on rank 1 (b)`.

    Args:
        gathered: for each rank its host and its values as text.
    """
    found = []
    for name in dict.fromkeys(name for _, texts in gathered for name in texts):
        owners: dict[str, list[int]] = {}
        for rank, (_, texts) in enumerate(gathered):
            if name in texts:
                owners.setdefault(texts[name], []).append(rank)
        if len(owners) > 1:
            hosts = [host for host, _ in gathered]
            found.append(f"{name} is " + ", ".join(f"{_shorten(text)} {_name(ranks, hosts)}" for text, ranks in owners.items()))
    more = len(found) - MOST_SHOWN
    return found[:MOST_SHOWN] + ([f"{more} more differ"] if more > 0 else [])


def reads_for_machine() -> bool:
    """Whether this rank reads, for all of its machine, what the ranks of one machine share. None does on a single machine."""
    local = [os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE")]
    return os.environ.get("LOCAL_RANK", "0") == "0" and local[0] != local[1]


def hash_pieces(path: Path) -> str:
    """Hash of a file's size, and of its beginning, middle and end."""
    size = path.stat().st_size
    digest = sha256(str(size).encode())
    with path.open("rb") as file:
        for start in (0, max(size // 2 - PIECE_BYTES // 2, 0), max(size - PIECE_BYTES, 0)):
            file.seek(start)
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()[:16]


def _name(ranks: list[int], hosts: list[str]) -> str:
    shown = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
    if len(ranks) == 1:
        return f"on rank {ranks[0]} ({shown})"
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"on ranks {ranks[0]} to {ranks[-1]} ({shown})"
    return f"on ranks {', '.join(map(str, ranks[:MOST_SHOWN]))}{' ...' if len(ranks) > MOST_SHOWN else ''} ({shown})"


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."
