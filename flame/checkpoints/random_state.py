"""The states of all random generators of a process, as tensors that a checkpoint can store."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def capture() -> dict[str, Tensor]:
    """Copy the states of the generators of torch (CPU and the current CUDA device), Python and numpy.

    Returns:
        CPU tensors by generator. Python and numpy may keep a normal variate for the next call. It is stored as float64 [2]:
        whether there is one, and its value.
    """
    version, words, python_normal = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_normal": torch.tensor([python_normal is not None, python_normal or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*numpy_state["state"]["key"].tolist(), numpy_state["state"]["pos"]], dtype=torch.int64),
        "numpy_normal": torch.tensor([numpy_state["has_gauss"], numpy_state["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Tensor]) -> None:
    """Set the generators to captured states. Skips missing states, and CUDA's on a machine without a GPU."""
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "python" in state:
        version, *words = state["python"].tolist()
        has_normal, normal = state["python_normal"].tolist()
        random.setstate((version, tuple(words), normal if has_normal else None))
    if "numpy" in state:
        *keys, position = state["numpy"].tolist()
        has_normal, normal = state["numpy_normal"].tolist()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(has_normal), normal))
