"""Does the future loss cost cross entropy on real text? A byte-level model on Python sources.

    python -m research.real_text run OUT --per_gpu 4
    python -m research.real_text report OUT research/experiments/real_text
    python -m research.real_text run OUT2 --laptop --per_gpu 2

The text is what Python packages this machine has, one document a file, each 50th held out. Runs of a seed see the same tokens in
the same order. "next token, more steps" has as many FLOPs as the runs with the future loss. `report` compares each run with that
of the same seed under next-token prediction alone: cross entropy on the held-out files, at the end. From random weights seeds
differ there by more than the harm in question. With `--start` all go on from one trained model, here of a sixth seed, since a
seed also decides which tokens come:

    python -m research.real_text run OUT --seeds 6 --variants "next token, more steps"
    python -m research.real_text run OUT3 --per_gpu 4 --start "OUT/text/next token, more steps/seed-6/hf"
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

from flame.compare.metrics import Metric
from research.command import Planned, compare_runs, run_command

TASK = "text"
STEPS = 1600
LAPTOP_STEPS = 600
MORE_STEPS = 1.35
"""Times the steps: what the future loss takes of the arithmetic of next-token training. The report shows the exact ratio."""
BASELINE = "next token"
MORE = "next token, more steps"
ALIKE = "next token, weight decay 0.101"
"""Of the default's 0.1 a hundredth more, which should change nothing: how far apart do runs that are alike end?"""
VARIANTS: dict[str, dict[str, object]] = {
    BASELINE: {"objective.name": "next_token"},
    MORE: {"objective.name": "next_token"},
    ALIKE: {"objective.name": "next_token", "optimizer.weight_decay": 0.101},
    "future, weight 0.03": {"objective.name": "future", "future_encoder.loss_weight": 0.03},
    "future, weight 0.03, from step 200": {
        "objective.name": "future",
        "future_encoder.loss_weight": 0.03,
        "objective.start_step": 200,
    },
    "future, weight 0.03, target_shift 0": {
        "objective.name": "future",
        "future_encoder.loss_weight": 0.03,
        "future_encoder.target_shift": 0,
    },
    "future, weight 0.1": {"objective.name": "future", "future_encoder.loss_weight": 0.1},
    "future, weight 0.3": {"objective.name": "future", "future_encoder.loss_weight": 0.3},
    "future, weight 0.1, random target": {
        "objective.name": "future",
        "future_encoder.loss_weight": 0.1,
        "future_encoder.target": "random",
    },
    "future, weight 0.1, random target, target_shift 0": {
        "objective.name": "future",
        "future_encoder.loss_weight": 0.1,
        "future_encoder.target": "random",
        "future_encoder.target_shift": 0,
    },
    "future, weight 0.1, target_shift 0": {
        "objective.name": "future",
        "future_encoder.loss_weight": 0.1,
        "future_encoder.target_shift": 0,
    },
}
DIAGNOSTICS = ("validation_mi_lower_bound",)
SIZE: dict[str, object] = {
    "model.config": "configs/models/llama_15M.json",
    "training.seq_len": 16_384,
    "training.context_len": 1024,
    "training.num_workers": 1,
    "training.compile": True,
    "optimizer.lr": 1e-3,
    "lr_scheduler.warmup_steps": 120,
    "future_encoder.max_anchors": 4096,  # at width 384 the scores of all would cost more than the network
    "validation.interval": 320,
    "validation.num_sequences": 64,
    "metrics.diagnostics_interval": 320,
}
LAPTOP_SIZE: dict[str, object] = {
    "model.config": "configs/models/llama_600K.json",
    "training.seq_len": 4096,
    "training.context_len": 256,
    "training.num_workers": 0,
    "optimizer.lr": 3e-3,
    "lr_scheduler.warmup_steps": 50,
    "future_encoder.max_anchors": 1024,
    "validation.interval": 200,
    "validation.num_sequences": 64,
    "metrics.diagnostics_interval": 200,
}


def list_runs(arguments: argparse.Namespace) -> list[Planned]:
    """One seed of the variants before the next."""
    steps = LAPTOP_STEPS if arguments.laptop else STEPS
    start: dict[str, object] = {}
    if arguments.start:
        start = {"checkpoint.initial_load_path": arguments.start.resolve(), "checkpoint.load_objective": False}
    base: dict[str, object] = {
        "model.tokenizer_path": "bytes",
        "training.dataset": "text",
        "training.data_files": arguments.data_files,
        "future_encoder.temperature": 0.1,
        "future_encoder.exclude_duplicates": True,
        "validation.holdout_every": 50,
        **(LAPTOP_SIZE if arguments.laptop else SIZE),
        **start,
    }

    def build_run(name: str, seed: int) -> Planned:
        more = round(steps * MORE_STEPS) if name == MORE else steps
        sized = {"training.steps": more, "checkpoint.interval": more}
        return Planned(TASK, name, seed, base | sized | VARIANTS[name])

    return [build_run(name, seed) for seed in arguments.seeds for name in arguments.variants]


def write_report(runs: Path, out: Path) -> None:
    metrics = (Metric("validation_ce_loss", is_higher_better=False), *(Metric(name, True) for name in DIAGNOSTICS))
    compare_runs(runs, out, metrics, BASELINE, by_length=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_files", default=f"{sysconfig.get_path('purelib')}/[a-t]*/**/*.py", help="glob of the text")
    parser.add_argument("--laptop", action="store_true", help="a model of 0.6 M parameters and few tokens, for CPUs")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"those to run, of: {'; '.join(VARIANTS)}",
    )
    parser.add_argument(
        "--start", type=Path, help="folder of an exported model that all runs begin with, instead of random weights"
    )


if __name__ == "__main__":
    run_command(__doc__, list_runs, write_report, add_options)
