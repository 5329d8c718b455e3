"""Processes, devices and the device mesh of a run."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flame.config.training import Training
from flame.errors import UserError
from flame.runtime.rendezvous import STORE_OF_ROUND
from flame.runtime.torchtitan import ParallelDims, ParallelismConfig

FLIGHT_RECORDS = "2000"
"""Collectives that NCCL's flight recorder remembers."""
SECONDS_TO_WRITE = 5
"""After a collective has waited too long, torch ends the process when four times this have passed, for all ranks to write."""


SINGLE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def set_single_process_defaults() -> None:
    """Make `python -m flame.train` without torchrun a run of one process. Port 0 makes the system choose a free port.

    Raises:
        UserError: the environment asks for several processes, and does not say which one this is or where they meet.
    """
    missing = [key for key in SINGLE_PROCESS if key not in os.environ]
    world_size = os.environ.get("WORLD_SIZE", "1")
    if missing and world_size != "1":
        raise UserError(
            f"WORLD_SIZE = {world_size} (environment) without {', '.join(missing)}: start the run with train.sh, which sets "
            "them all, or unset WORLD_SIZE for a run of one process"
        )
    for key in missing:
        os.environ[key] = SINGLE_PROCESS[key]


def get_world_size() -> int:
    """Number of processes of the run. Works before the process group exists."""
    return int(os.environ["WORLD_SIZE"])


def get_rank() -> int:
    """Rank of this process in the run. Works before the process group exists."""
    return int(os.environ["RANK"])


def start_processes(training: Training, timeout_seconds: int) -> tuple[torch.device, DeviceMesh]:
    """Join the process group and build the mesh.

    Args:
        timeout_seconds: `comm.timeout_seconds`.

    Raises:
        UserError: there are more processes on this machine than GPUs.

    Returns:
        this process's device, and the mesh to shard over: one-dimensional (FSDP), or replicate x shard (HSDP).
    """
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first CUDA context is made
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property; slow
    on_gpu = torch.cuda.is_available()
    if on_gpu and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise UserError(f"NGPU asks for more processes than this machine has GPUs, {torch.cuda.device_count()}: lower it")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # Gloo beside NCCL: counts on the CPU are summed there, without waiting for the GPU.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(
        backend,
        store=_open_store(timeout),
        rank=get_rank(),
        world_size=get_world_size(),
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    dims = ParallelDims.from_config(
        ParallelismConfig(
            data_parallel_replicate_degree=training.data_parallel_replicate_degree,
            data_parallel_shard_degree=training.data_parallel_shard_degree,
            spmd_backend="partial_dtensor",
        ),
        get_world_size(),
    )
    axes = ["dp_replicate", "fsdp"] if dims.dp_replicate_enabled else ["fsdp"]
    return device, dims.get_mesh(axes)


def _open_store(timeout: timedelta) -> dist.Store:
    """The store in which ranks find each other. Workers that are started again must not find the addresses of the ended ones."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and get_world_size() == 1:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if os.environ.get(STORE_OF_ROUND) == "1":
        return store  # the restarts that a machine has counted may be others than another machine's
    return dist.PrefixStore(f"flame/start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def keep_flight_record(folder: Path) -> None:
    """Let NCCL write which collectives each rank has begun and ended, when one waits too long: `nccl-RANK` in a folder.

    Call it before the process group exists. Variables that the user has set stay.
    """
    record = {
        "TORCH_FR_BUFFER_SIZE": FLIGHT_RECORDS,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder.absolute() / "nccl-"),
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": str(1000 * SECONDS_TO_WRITE),
    }
    for key, value in record.items():
        os.environ.setdefault(key, value)


def get_gpu() -> int | None:
    """The GPU that this thread uses; None without one."""
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def use_gpu(gpu: int | None) -> None:
    """To be called first in a new thread, with the main thread's `get_gpu`. Otherwise the thread would use the first GPU."""
    if gpu is not None:
        torch.cuda.set_device(gpu)


def end_processes() -> None:
    """Leave the process group together: the launcher kills the other ranks when one ends early."""
    dist.barrier()
    dist.destroy_process_group()


def leave_at_once(exit_code: int) -> NoReturn:
    """End this process without the process group, in which nobody answers: to take it down in order may hang or crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def sum_over_ranks(*numbers: int) -> list[int]:
    """Sum each integer over all ranks, exactly, in one collective call."""
    totals = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(totals)
    return totals.tolist()
