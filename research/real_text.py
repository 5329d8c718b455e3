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
    python -m research.real_text run OUT3 --per_gpu 4 --start "OUT/next token, more steps/seed 6/hf"
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flame.compare.tables import format_table, show_range
from research.run_folder import Row, list_ended, read_progress, read_rows
from research.run_queue import Run, never, run_command

STEPS = 1600
LAPTOP_STEPS = 600
MORE_STEPS = 1.35
"""Times the steps: what the future loss takes of the arithmetic of next-token training. The report shows the exact ratio."""
HARM = 0.5
"""Rise of cross entropy, in percent, that counts as harm."""
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
DIAGNOSTICS = {
    "validation_mi_lower_bound": "ln N - loss on held-out files, nats",
    "future/rank_targets": "rank of targets",
    "future/grad_cosine": "cosine of the gradients",
}
"""Shown as they are at the end of a run."""
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


def list_runs(arguments: argparse.Namespace) -> list[Run]:
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

    def build_run(name: str, seed: int) -> Run:
        more = round(steps * MORE_STEPS) if name == MORE else steps
        sized = {"training.seed": seed, "training.steps": more, "checkpoint.interval": more}
        return Run(f"{name}/seed {seed}", base | sized | VARIANTS[name], never)

    return [build_run(name, seed) for seed in arguments.seeds for name in arguments.variants]


def write_report(runs: Path, out: Path) -> None:
    """Write `real_text.md`, of the runs that have ended, into a folder. A seed counts where the baseline has ended too."""
    columns = ["objective", "seeds", "tokens, millions", "FLOPs / baseline"]
    columns += [
        "held-out cross entropy, nats a byte",
        "the baseline's on the same seeds",
        "change on the same seed, %",
        f"worse by more than {HARM} %",
    ]
    columns += list(DIAGNOSTICS.values())
    baseline = {folder.name: _read(folder) for folder in list_ended(runs, f"{BASELINE}/*")}
    rows = []
    for name in VARIANTS:
        found = {folder.name: _read(folder) for folder in list_ended(runs, f"{name}/*")}
        pairs = [(found[seed], baseline[seed]) for seed in found if seed in baseline]
        if pairs:
            losses = [show_range([run.loss for run in runs], "{:.4f}") for runs in zip(*pairs, strict=True)]
            changes = [100 * (own.loss / other.loss - 1) for own, other in pairs]
            harmed = f"{sum(change > HARM for change in changes)}/{len(pairs)}"
            work = statistics.mean(own.tflops / other.tflops for own, other in pairs)
            diagnostics = [_show_last(name, [own for own, _ in pairs]) for name in DIAGNOSTICS]
            rows.append(
                [
                    name,
                    str(len(pairs)),
                    f"{pairs[0][0].tokens / 1e6:.1f}",
                    f"{work:.2f}",
                    *losses,
                    show_range(changes, "{:+.2f}"),
                    harmed,
                    *diagnostics,
                ]
            )
    table = "\n".join(format_table(columns, rows))
    (out / "real_text.md").write_text(table + "\n")
    print(table)


class End(NamedTuple):
    """What a run came to."""

    loss: float
    """Held-out cross entropy."""
    tokens: float
    """Trained on."""
    tflops: float
    """Spent."""
    row: Row
    """The last value of everything logged."""


def _read(folder: Path) -> End:
    progress, row = read_progress(folder), {name: value for row in read_rows(folder) for name, value in row.items()}
    return End(row["validation_ce_loss"], progress.tokens[-1], progress.tflops[-1], row)


def _show_last(name: str, ends: Sequence[End]) -> str:
    values = [end.row[name] for end in ends if name in end.row]
    return show_range(values, "{:.2f}") if values else "-"


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
    run_command(__doc__, list_runs, write_report, f"{BASELINE}/*", add_options)
