"""Functions that run on several ranks at once."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

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
