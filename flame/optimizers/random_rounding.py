"""Random rounding to bfloat16, which keeps the sum of many small changes on average.

Neighboring bfloat16 numbers differ by a relative 1/256 to 1/128. With beta2 = 0.999 a moment decays by 0.001 per step, less than
half of that. Rounded to nearest, it would never change.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_DROPPED = 1 << 16  # a bfloat16 is the upper half of a float32


def round_into(target: Tensor, values: Tensor, *key: int | str) -> None:
    """Store values in `target`, each rounded up or down at random such that its mean is exact.

    Args:
        target: bfloat16.
        values: finite float32 of the same shape, on the same device; overwritten.
        key: seed of the draws. The global generators, which dropout uses, are not touched.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator(values.device).manual_seed(int.from_bytes(digest) >> 1)
    noise = torch.randint(_DROPPED, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = values.view(torch.int32)
    bits += noise
    bits &= -_DROPPED
    target.copy_(values)


def name_draws(parameter: str) -> str:
    """The name by which a parameter's draws are seeded: its own, without that of the objective that holds it."""
    return parameter.removeprefix("objective.")


def get_local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor. It shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def find_shard_axis(tensor: Tensor) -> int | None:
    """The mesh axis over which the tensor is sharded; None if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return None
    return next((axis for axis, placement in enumerate(tensor.placements) if placement.is_shard()), None)


def get_shard(tensor: Tensor) -> int:
    """Index of this rank's shard. Replicas hold the same shard, and must round it in the same way."""
    axis = find_shard_axis(tensor)
    return 0 if axis is None or not isinstance(tensor, DTensor) else tensor.device_mesh.get_local_rank(axis)
