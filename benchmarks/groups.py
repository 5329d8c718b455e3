"""What FSDP groups cost a small model on one device: steps of path-star training with one group, and with one for each layer.

    python -m benchmarks.groups OUT [--config configs/pathstar.toml] [--tokens 36352] [--rounds 3] [--steps 100]

The two take turns, a run each. Medians of all steps after a run's first 20, with lowest and highest.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.timing import Report
from flame.compare.tables import show_range
from flame.models import parallelize
from flame.runtime.distributed import end_processes, set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options

WARMUP = 20
GROUPS = {"one group": parallelize.MOST_WEIGHTS_IN_ONE_GROUP, "one for each layer": 0}
"""The most weights that are kept in one group."""


def time_steps(folder: Path, arguments: argparse.Namespace) -> list[float]:
    """Milliseconds of the steps of a run."""
    config = read_options(
        [
            *("--job.config_file", arguments.config, "--job.dump_folder", str(folder)),
            *("--training.seq_len", str(arguments.tokens), "--checkpoint.enable_checkpoint", "false"),
            *("--metrics.log_freq", "1000000", "--metrics.diagnostics_interval", "1000000"),
            *("--training.steps", "1000000", "--validation.interval", "1000000"),
        ],
        1,
    )
    trainer = Trainer(config)
    trainer._resume()
    trainer._open_run()
    times = []
    for _ in range(WARMUP + arguments.steps):
        start = time.perf_counter()
        trainer.train_step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    trainer._close_run()
    end_processes()
    return times[WARMUP:]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="What FSDP groups cost a small model.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for groups.md")
    parser.add_argument("--config", default="configs/pathstar.toml", help="configuration of the runs")
    parser.add_argument("--tokens", type=int, default=36_352, help="tokens a step")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each run")
    arguments = parser.parse_args(argv)
    set_single_process_defaults()
    times: dict[str, list[float]] = {name: [] for name in GROUPS}
    for number in range(arguments.rounds):
        for name, most in GROUPS.items():
            with patch.object(parallelize, "MOST_WEIGHTS_IN_ONE_GROUP", most):
                times[name] += time_steps(arguments.out / f"{name} {number}", arguments)
            gc.collect()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU, {torch.get_num_threads()} threads"
    report = Report(arguments.out / "groups.md")
    rows = [[name, show_range(taken, "{:,.1f}")] for name, taken in times.items()]
    report.table(f"{arguments.config}, {arguments.tokens:,} tokens a step on {device}", ["", "ms a step"], rows)


if __name__ == "__main__":
    main(sys.argv[1:])
