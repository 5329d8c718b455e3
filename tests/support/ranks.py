"""Functions that run on several ranks at once."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A clean process that has imported everything; the ranks are forked from it in no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__, "tests.support.checkpoints", "tests.support.runs", "flame.weights.load"])

Scenario = Callable[..., Any]


def run_on_ranks(ranks: int, folder: Path, scenario: Scenario, *arguments: object) -> list[Any]:
    """What each rank returns from `scenario(folder, *arguments)`."""
    results = PROCESSES.SimpleQueue()
    rendezvous = folder.parent / f"rendezvous-{len(list(folder.parent.iterdir()))}"
    processes = [
        PROCESSES.Process(target=_run_rank, args=(rank, ranks, rendezvous, results, scenario, folder, *arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    outcomes = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    for rank, (is_good, outcome) in outcomes.items():
        assert is_good, f"rank {rank}:\n{outcome}"
    return [outcomes[rank][1] for rank in range(ranks)]


def _run_rank(rank: int, ranks: int, rendezvous: Path, results: Any, scenario: Scenario, *arguments: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    try:
        results.put((rank, (True, scenario(*arguments))))
        dist.barrier()
    except BaseException:
        results.put((rank, (False, traceback.format_exc())))
    dist.destroy_process_group()


def train_on_ranks(ranks: int, argvs: list[list[str]], prepare: Callable[[], object] | None = None) -> None:
    """One run of the trainer after another on ranks that stay, for each command line.

    Args:
        prepare: what each rank does first.
    """
    with TemporaryDirectory() as folder:
        arguments, method = (ranks, folder, argvs, prepare), PROCESSES.get_start_method()
        mp.start_processes(_train_rank, args=arguments, nprocs=ranks, start_method=method)


def train_to_their_ends(ranks: int, argv: list[str], errors: Path) -> list[tuple[int, str]]:
    """Exit code of each rank of a run, and what it wrote to stderr.

    Args:
        errors: folder for the latter.
    """
    with TemporaryDirectory() as folder:
        arguments = [(rank, ranks, folder, [argv], partial(_write_errors, errors)) for rank in range(ranks)]
        processes = [PROCESSES.Process(target=_train_rank, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    return [(process.exitcode, (errors / str(rank)).read_text()) for rank, process in enumerate(processes)]


def _write_errors(folder: Path) -> None:
    sys.stderr = (folder / os.environ["RANK"]).open("w")


def _train_rank(rank: int, ranks: int, folder: str, argvs: list[list[str]], prepare: Callable[[], object] | None = None) -> None:
    """The ranks of each run meet in a file of its own. They draw no curves, which takes half of a toy run's time."""
    from flame.train import main  # not at the top: this module is the first that a clean process imports

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "a file", "MASTER_PORT": "of the test"}
    if prepare is not None:
        prepare()
    for number, argv in enumerate(argvs):
        store = partial(_open_store, f"{folder}/{number}", ranks)
        with patch("flame.runtime.distributed._open_store", store), patch("flame.logging.plots.plot_run"):
            main(argv)


def _open_store(path: str, ranks: int, timeout: timedelta) -> dist.Store:
    store = dist.FileStore(path, ranks)
    store.set_timeout(timeout)
    return store
