"""Rounding to bfloat16 at random, so that a sum of many small changes is kept on average.

A moment that decays by 1 - beta2 = 0.001 a step changes by less than half the distance between bfloat16 numbers (1/256 to 1/128
of them): rounded to nearest it would stay where it is.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_DROPPED = 1 << 16  # a bfloat16 is the upper half of a float32


def round_into(target: Tensor, values: Tensor, *key: int | str) -> None:
    """Store values, each rounded up or down with the probability that makes its mean exact.

    Args:
        target: bfloat16. values: finite float32 of the same shape, on the same device; overwritten.
        key: decides the draws, and nothing else does: the global generators, which dropout uses, are left alone.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator(values.device).manual_seed(int.from_bytes(digest) >> 1)
    noise = torch.randint(_DROPPED, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = values.view(torch.int32)
    bits += noise
    bits &= -_DROPPED
    target.copy_(values)


def get_local(tensor: Tensor) -> Tensor:
    """This rank's part: what is written into it is in the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def find_shard_axis(tensor: Tensor) -> int | None:
    """The axis of the tensor's mesh over which it is sharded; None for a whole one."""
    if not isinstance(tensor, DTensor):
        return None
    return next((axis for axis, placement in enumerate(tensor.placements) if placement.is_shard()), None)


def get_shard(tensor: Tensor) -> int:
    """Which shard this rank holds. Replicas hold the same one, and must round alike."""
    axis = find_shard_axis(tensor)
    return 0 if axis is None or not isinstance(tensor, DTensor) else tensor.device_mesh.get_local_rank(axis)
