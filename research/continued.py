"""Does the future loss help a real pretrained model on a real corpus? SmolLM2-135M, continued on Python packages.

    python -m benchmarks.fetch_smollm2 MODEL
    python -m research.continued_corpora TEXT
    python -m research.continued run OUT --model MODEL --text TEXT --variants "predictor alone"
    python -m research.continued run OUT --model MODEL --text TEXT
    python -m research.bits_per_byte TEXT/*_held_out.jsonl --models MODEL OUT/*/*/seed*/hf
    python -m research.continued report OUT research/experiments/continued

Runs of a seed see the same tokens in the same order. "predictor first" starts with the predictor that "predictor alone" has
trained on the frozen model, so that run has to be made before. "next token, weight decay 0.101" changes nothing that matters: it
shows how far apart two runs end that are alike. `report` compares each run with that of the same seed under next-token training
alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flame.compare.results import read_progress, read_rows
from flame.compare.tables import format_table, show_range
from research.bits_per_byte import RESULT_FILE
from research.command import SEED, Planned, list_ended, run_command

TASK = "python"
STEPS = 320
PREDICTOR_STEPS = 64
BASELINE = "next token"
PREDICTOR = "predictor alone"
PREDICTOR_FIRST = "future, shift 0, predictor first"
FUTURE: dict[str, object] = {
    "objective.name": "future",
    "future_encoder.loss_weight": 0.1,
    "future_encoder.target_shift": 0,
    "future_predictor.lr_scale": 3.0,
}
VARIANTS: dict[str, dict[str, object]] = {
    PREDICTOR: FUTURE | {"experimental.freeze_lm_for_infonce": True},
    BASELINE: {"objective.name": "next_token"},
    "next token, weight decay 0.101": {"objective.name": "next_token", "optimizer.weight_decay": 0.101},
    "future, shift 0": FUTURE,
    PREDICTOR_FIRST: FUTURE,
}
TEXTS = {"python_held_out": "new text", "prose_held_out": "English prose"}
BASE: dict[str, object] = {
    "training.dataset": "json",
    "training.seq_len": 32_768,
    "training.context_len": 2048,
    "training.num_workers": 2,
    "training.compile": True,
    "lr_scheduler.warmup_steps": 50,
    "lr_scheduler.lr_min": 0.0,
    "future_encoder.max_anchors": 8192,  # at this width the scores of all would cost as much as the network
    "validation.dataset": "json",
    "validation.num_sequences": 8,
    "validation.interval": 80,
    "metrics.diagnostics_interval": 160,
}


def list_runs(arguments: argparse.Namespace) -> list[Planned]:
    """One seed of the variants before the next."""

    def build_run(name: str, seed: int) -> Planned:
        steps = PREDICTOR_STEPS if name == PREDICTOR else arguments.steps
        start = arguments.out / TASK / PREDICTOR / f"{SEED}{seed}" / "hf" if name == PREDICTOR_FIRST else arguments.model
        options: dict[str, object] = {
            "checkpoint.initial_load_path": start.resolve(),
            "training.data_files": arguments.text.resolve() / "python.jsonl",
            "validation.data_files": arguments.text.resolve() / "python_held_out.jsonl",
            "training.steps": steps,
            "checkpoint.interval": steps,
            "optimizer.lr": arguments.lr,
        }
        return Planned(TASK, name, seed, BASE | options | VARIANTS[name])

    return [build_run(name, seed) for seed in arguments.seeds for name in arguments.variants]


class End(NamedTuple):
    """What a run came to."""

    bits: dict[str, float]
    """Bits per byte of each text."""
    tflops: float
    future: float | None
    """ln N - future loss on held-out text at the end, nats."""


def _read(folder: Path) -> End:
    rows = read_rows(folder)
    row = {name: value for each in rows for name, value in each.items()}
    bits = json.loads((folder / "hf" / RESULT_FILE).read_text())
    return End(bits, read_progress(rows).tflops[-1], row.get("validation_mi_lower_bound"))


def write_report(runs: Path, out: Path) -> None:
    """Write `continued.md`, of the runs that have ended and were measured. A seed counts where the baseline has ended too."""
    columns = ["objective", "seeds", "FLOPs / baseline"]
    for title in TEXTS.values():
        columns += [f"{title}, bits per byte", "change on the same seed, %: mean ± deviation", "each seed"]
    columns.append("ln N - loss, nats")
    rows = []
    baseline = {folder.name: _read(folder) for folder in list_ended(runs, TASK, BASELINE)}
    for name in (each for each in VARIANTS if each != PREDICTOR):
        found = {folder.name: _read(folder) for folder in list_ended(runs, TASK, name)}
        pairs = [(found[seed], baseline[seed]) for seed in sorted(found) if seed in baseline]
        if pairs:
            row = [name, str(len(pairs)), f"{statistics.mean(own.tflops / other.tflops for own, other in pairs):.2f}"]
            for text in TEXTS:
                changes = [100 * (own.bits[text] / other.bits[text] - 1) for own, other in pairs]
                row += [show_range([own.bits[text] for own, _ in pairs], "{:.4f}"), _show_mean(changes)]
                row.append(", ".join(f"{change:+.3f}" for change in changes))
            future = [own.future for own, _ in pairs if own.future is not None]
            rows.append([*row, show_range(future, "{:.2f}") if future else "-"])
    table = "\n".join(format_table(columns, rows))
    (out / "continued.md").write_text(table + "\n")
    print(table)


def _show_mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.3f}{spread}"


def add_options(parser: argparse.ArgumentParser) -> None:
    names = [name for name in VARIANTS if name != PREDICTOR]
    parser.add_argument("--model", type=Path, required=True, help="folder of benchmarks.fetch_smollm2")
    parser.add_argument("--text", type=Path, required=True, help="folder of research.continued_corpora")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BASE['training.seq_len']} tokens, default {STEPS}")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate, default 3e-4")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=names, metavar="NAME", help="; ".join(VARIANTS))


if __name__ == "__main__":
    run_command(__doc__, list_runs, write_report, add_options)
