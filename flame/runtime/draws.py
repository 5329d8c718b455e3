"""Random draws that need no generator: hashes of counters.

They are the same on CPUs and GPUs, and inside a CUDA graph they follow a seed that is a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
BITS = 62
"""Of a draw."""


def draw_integers(run_seed: int, number: Tensor, count: int) -> Tensor:
    """Draw `count` integers from 0 to 2^62 - 1 that depend on two numbers alone.

    They are successive outputs of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators",
    figure 17) without their two lowest bits. Its state begins at a hash of both numbers.

    Args:
        run_seed: such as `training.seed`.
        number: int64 0-d, such as a packed sequence's index. The result is on its device.

    Returns:
        int64 [count].
    """
    start = _mix(_mix(number + _to_signed(run_seed * GOLDEN_GAMMA)) + _to_signed(GOLDEN_GAMMA))
    counter = torch.arange(1, count + 1, device=number.device)
    return _shift_right(_mix(start + counter * _to_signed(GOLDEN_GAMMA)), 64 - BITS)


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's output function. int64 products wrap around, as unsigned ones do."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        values = (values ^ _shift_right(values, shift)) * _to_signed(multiplier)
    return values ^ _shift_right(values, SHIFTS[-1])


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift in zeros, as for unsigned numbers."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _to_signed(value: int) -> int:
    """The int64 with the lowest 64 bits of an integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
