"""Whole runs of the trainer at toy size, in this process or on several, and what they leave behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flame.checkpoints.manager import list_checkpoints
from flame.runtime.distributed import set_single_process_defaults
from flame.train import Trainer, main
from flame.trainer.options import read_options
from flame.weights.tensors import read_model_tensors
from tests.support.paths import REPO
from tests.support.ranks import train_on_ranks

SEQ_LEN = 64
MICRO_STEPS = 2
RANKS_SECONDS = 240
MEASURED = ("loss", "ce_loss", "aux_loss", "mi_lower_bound", "infonce_accuracy", "grad_norm", "lr", "anchors")


def options(workspace: Path, run: Path, **changes: object) -> list[str]:
    """Command line of a toy run, which exports no model: few tests look at one. A change to None leaves the option out."""
    values = {
        "job.dump_folder": run,
        "model.config": workspace / "model",
        "model.tokenizer_path": "bytes",
        "training.dataset": "json",
        "training.data_files": workspace / "corpus.jsonl",
        "training.num_streams": 12,
        "training.num_workers": 0,
        "training.seq_len": SEQ_LEN,
        "training.context_len": 48,
        "training.steps": 6,
        "training.gradient_accumulation_steps": MICRO_STEPS,
        "optimizer.lr": 1e-2,
        "lr_scheduler.warmup_steps": 2,
        "objective.name": "future",
        "future_encoder.learnable_temperature": True,
        "future_predictor.dropout": 0.1,
        "checkpoint.interval": 3,
        "checkpoint.export_hf": False,
        "metrics.log_freq": 1,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return [
        part
        for key, value in values.items()
        if value is not None
        for part in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
    ]


def run_here(workspace: Path, run: Path, **changes: object) -> list[dict]:
    main(options(workspace, run, **changes))
    return read_metrics(run)


def cut_power_after(step: int, argv: list[str]) -> None:
    """Train here until a step is done, and then leave nothing in order."""

    class PowerCut(Exception):
        pass

    class Interrupted(Trainer):
        def train_step(self):
            super().train_step()
            if self.step == step:
                raise PowerCut

    set_single_process_defaults()
    with pytest.raises(PowerCut):
        Interrupted(read_options(argv, 1)).train()
    dist.destroy_process_group()


def run_ranks(ranks: int, workspace: Path, run: Path, says: str = "", **changes: object) -> list[dict]:
    """Metrics of a run of its own processes, in whose output something must stand."""
    arguments = ["-m", "flame.train", *options(workspace, run, **changes)]
    if ranks > torch.cuda.device_count() == 1:
        printed = run_on_shared_gpu(ranks, arguments)
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run([sys.executable, *launcher, *arguments], cwd=REPO, capture_output=True, text=True)
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed
    assert says in printed, printed
    return read_metrics(run)


def run_on_shared_gpu(ranks: int, arguments: list[str]) -> str:
    """Run ranks on the only GPU. NCCL allows that to ranks which it takes for other machines'."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_port(), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments], cwd=REPO, env=os.environ | meeting | act_as_machine(rank) | {"RANK": str(rank)}, **pipes
        )
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=RANKS_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(printed)
    return "\n".join(printed)


def act_as_machine(number: int) -> dict[str, str]:
    """Variables by which NCCL takes a process for one of another machine, also where several share a GPU."""
    return {"NCCL_HOSTID": f"machine-{number}"}


def find_free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def fork_ranks(
    ranks: int, workspace: Path, run: Path, prepare: Callable[[], object] | None = None, **changes: object
) -> list[dict]:
    """As `run_ranks`, without the launcher and by processes that have imported everything, which first do what `prepare` says."""
    train_on_ranks(ranks, [options(workspace, run, **changes)], prepare)
    return read_metrics(run)


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measured(rows: list[dict]) -> list[dict]:
    """What must not depend on time, restarts or the machine."""
    return [{"step": row["step"]} | {name: row[name] for name in MEASURED if name in row} for row in rows]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return read_model_tensors(list_checkpoints(run / "checkpoint")[-1])
