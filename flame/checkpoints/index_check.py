"""Checks the index of a checkpoint's tensors. One changed byte can give its parts other names, types or sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata


def check_index(metadata: Metadata) -> None:
    """Check types and ranges, that the chunks of each tensor cover it, and that each has a place in a file of this folder.

    Raises:
        ValueError: something is missing, or of another type, or out of range.
    """
    try:
        fault = _find_fault(metadata)
    except (AttributeError, TypeError, LookupError) as error:  # a part without its attributes
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        raise ValueError(f"it is no index of tensors: {fault}")


def _find_fault(metadata: Metadata) -> str | None:
    places = dict(metadata.storage_data)
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            return f"{key!r} is no name"
        if isinstance(entry, BytesStorageMetadata):
            continue
        if not isinstance(entry, TensorStorageMetadata) or not isinstance(entry.properties.dtype, torch.dtype):
            return f"{key} is no tensor"
        size = _read_sizes(entry.size)
        if size is None:
            return f"{key} has no shape"
        covered = 0
        for chunk in entry.chunks:
            offsets, sizes = _read_sizes(chunk.offsets), _read_sizes(chunk.sizes)
            if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(size):
                return f"{key} has a chunk without place or size"
            if any(start + length > whole for start, length, whole in zip(offsets, sizes, size, strict=True)):
                return f"{key} has a chunk outside of it"
            if MetadataIndex(key, chunk.offsets) not in places:
                return f"{key} has a chunk that no file holds"
            covered += math.prod(sizes)
        if covered != math.prod(size) or len({tuple(chunk.offsets) for chunk in entry.chunks}) != len(entry.chunks):
            return f"the chunks of {key} are not the whole of it"
    for index, place in places.items():
        if index.fqn not in metadata.state_dict_metadata:
            return f"{index.fqn} has a place and no shape"
        name = place.relative_path
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            return f"{index.fqn} is in {name!r}, which is no file of this folder"
        if not (_is_count(place.offset) and _is_count(place.length)):
            return f"{index.fqn} has no place in {name}"
    return None


def _read_sizes(sizes: Any) -> tuple[int, ...] | None:
    """Plain integers, none negative; None for anything else."""
    return tuple(sizes) if isinstance(sizes, torch.Size) and all(map(_is_count, sizes)) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0
