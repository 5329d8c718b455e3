"""Where the runs of a comparison run at the same time."""

from __future__ import annotations

import os
from typing import NamedTuple

from flame.errors import UserError


class Slot(NamedTuple):
    """Room for one run at a time."""

    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them; empty without GPUs."""
    threads: int
    """CPU threads of each process."""

    @property
    def environment(self) -> dict[str, str]:
        """For a run in this slot; what the user has set of it stays."""
        threads = {"OMP_NUM_THREADS": str(self.threads), "GOMP_SPINCOUNT": "10000"}  # as train.sh does
        chosen = {key: value for key, value in threads.items() if key not in os.environ}
        return chosen | ({"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {})


def list_slots(parallel: int, gpus_per_run: int, gpus: list[str] | None = None, cores: int | None = None) -> list[Slot]:
    """The slots of this machine: `parallel` on each group of `gpus_per_run` GPUs or, without GPUs, `parallel` in all.

    Args:
        gpus: those there are; None looks for them.
        cores: those there are; None asks the system.

    Raises:
        UserError: a run needs more GPUs than there are.
    """
    gpus = list_gpus() if gpus is None else gpus
    cores = cores or len(os.sched_getaffinity(0))
    if gpus and len(gpus) < gpus_per_run:
        raise UserError(f"compare.gpus_per_run = {gpus_per_run}: this machine has {len(gpus)}, lower it")
    groups = [tuple(gpus[start : start + gpus_per_run]) for start in range(0, len(gpus) - gpus_per_run + 1, gpus_per_run)] or [()]
    threads = max(1, cores // (len(groups) * parallel * gpus_per_run))
    return [Slot(group, threads) for _ in range(parallel) for group in groups]


def list_gpus() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name]
    import torch  # it takes seconds

    return [str(gpu) for gpu in range(torch.cuda.device_count())]
