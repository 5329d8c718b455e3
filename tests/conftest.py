"""Settings of the whole suite."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Fresh memory holds NaN, so that a missed initialisation shows.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
# The tensors are small, and threads that wait for a busy core cost more than they give.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("flame", deadline=None, max_examples=40)
settings.load_profile("flame")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and what takes long unless it is asked for."""
    wants_slow = "slow" in config.getoption("-m")
    gpus = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("multi_gpu") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason="needs two GPUs"))
        elif item.get_closest_marker("gpu") and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif item.get_closest_marker("slow") and not wants_slow:
            item.add_marker(pytest.mark.skip(reason="slow: pytest -m slow"))
