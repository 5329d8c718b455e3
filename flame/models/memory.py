"""Estimates the memory that a model needs, while it is still on the meta device, and compares it with what is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from flame.config.training import Optimizer
from flame.errors import UserError

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_experts", "num_local_experts")
"""Keys of a configuration that decide how many weights there are."""
GIB = 1 << 30
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Share(NamedTuple):
    """How the weights are spread."""

    shards: int
    """Ranks over which each weight is sharded."""
    neighbors: int
    """Ranks that share this machine's memory."""


def check_memory(
    model: nn.Module, config: PretrainedConfig, label: str, device: torch.device, share: Share, moment_bytes: int
) -> None:
    """Check that weights, gradients and moments fit the memory, without which no step can be made. Activations come on top.

    Args:
        model: on the meta device.
        label: of the configuration in error lines, such as `model.config = "m.json"`.
        device: where the weights will be.
        moment_bytes: bytes of the optimizer's moments for each weight.

    Raises:
        UserError: they do not.
    """
    needed = estimate_bytes(model, moment_bytes) / share.shards
    there = float(find_memory(device))
    if device.type != "cuda":
        there /= share.neighbors
    if needed > there:
        count = sum(parameter.numel() for parameter in model.parameters())
        sizes = ", ".join(f"{key} = {getattr(config, key)}" for key in SIZES if getattr(config, key, None) is not None)
        place = "a GPU" if device.type == "cuda" else "each process"
        raise UserError(
            f"{label}: {count:.3g} weights with their gradients and moments need {needed / GIB:,.0f} GiB for {place}, which has "
            f"{there / GIB:,.1f}: lower one of {sizes}, or use more GPUs"
        )


def estimate_bytes(model: nn.Module, moment_bytes: int) -> int:
    """Bytes of float32 weights, of their gradients, and of moments."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 4 * weights + (4 + moment_bytes) * trained


def find_moment_bytes(optimizer: Optimizer) -> int:
    """Bytes of AdamW's moments of one weight."""
    return 4 if optimizer.state_dtype == "bfloat16" else 8


def find_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of this machine with its swap, as far as a container may use it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for path in CGROUP_LIMITS if (text := _read(path)).isdecimal()]
    return min([pages + _read_swap(), *limits])


def _read_swap() -> int:
    lines = [line.split() for line in _read("/proc/meminfo").splitlines() if line.startswith("SwapTotal:")]
    return int(lines[0][1]) * 1024 if lines else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
