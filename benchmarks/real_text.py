"""Does the future loss cost cross entropy on real text? A byte-level model on Python sources.

    python -m benchmarks.real_text run OUT --per_gpu 4
    python -m benchmarks.real_text report OUT docs/experiments/real_text
    python -m benchmarks.real_text run OUT2 --per_gpu 4 --start "OUT/next token, more steps/seed 1/hf"
    python -m benchmarks.real_text run OUT3 --laptop --per_gpu 2

The text is what Python packages this machine has, one document a file, each 50th held out. Runs of a seed see the same tokens in
the same order. "next token, more steps" has as many FLOPs as the runs with the future loss. `report` compares each run with that
of the same seed under next-token prediction alone: cross entropy on the held-out files, at the end. From random weights seeds
differ there by more than the harm in question; with `--start` all runs go on from one trained model.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
from pathlib import Path

from benchmarks.run_queue import Run, list_ended, never, read_rows, read_validations, run_command

STEPS = 1600
LAPTOP_STEPS = 600
MORE_STEPS = 1.35
"""Times the steps: what the future loss takes of the arithmetic of next-token training. The report shows the exact ratio."""
BASELINE = "next token"
MORE = "next token, more steps"
VARIANTS: dict[str, dict[str, object]] = {
    BASELINE: {"objective.name": "next_token"},
    MORE: {"objective.name": "next_token"},
    "future, weight 0.03": {"objective.name": "future", "future_encoder.loss_weight": 0.03},
    "future, weight 0.1": {"objective.name": "future", "future_encoder.loss_weight": 0.1},
    "future, weight 0.3": {"objective.name": "future", "future_encoder.loss_weight": 0.3},
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
    "metrics.future_interval": 320,
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
    "metrics.future_interval": 200,
}


def list_runs(arguments: argparse.Namespace) -> list[Run]:
    """One seed of the variants before the next."""
    steps = LAPTOP_STEPS if arguments.laptop else STEPS
    start: dict[str, object] = {"checkpoint.initial_load_path": arguments.start.resolve()} if arguments.start else {}
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
    rows = ["| objective | seeds | tokens, millions | FLOPs / baseline | held-out cross entropy | against the baseline, % |"]
    rows.append("|---|---|---|---|---|---|")
    baseline = {folder.name: _read(folder) for folder in list_ended(runs, f"{BASELINE}/*")}
    for name in VARIANTS:
        found = {folder.name: _read(folder) for folder in list_ended(runs, f"{name}/*")}
        pairs = [(found[seed], baseline[seed]) for seed in found if seed in baseline]
        if not pairs:
            continue
        losses = [own[0] for own, _ in pairs]
        changes = [100 * (own[0] / other[0] - 1) for own, other in pairs]
        tokens, work = pairs[0][0][1] / 1e6, statistics.mean(own[2] / other[2] for own, other in pairs)
        rows.append(
            f"| {name} | {len(pairs)} | {tokens:.0f} | {work:.2f} | {statistics.mean(losses):.4f} | "
            f"{statistics.mean(changes):+.2f} [{min(changes):+.2f}, {max(changes):+.2f}] |"
        )
    (out / "real_text.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


def _read(folder: Path) -> tuple[float, float, float]:
    """Held-out cross entropy at the end, tokens seen, TFLOP spent."""
    step = tokens = spent = 0.0
    for row in read_rows(folder):
        if "step_tflops" in row:
            spent += row["step_tflops"] * (row["step"] - step)
            step, tokens = row["step"], row["tokens_seen"]
    return list(read_validations(folder))[-1]["validation_ce_loss"], tokens, spent


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_files", default=f"{sysconfig.get_path('purelib')}/[a-t]*/**/*.py", help="glob of the text")
    parser.add_argument("--laptop", action="store_true", help="a model of 0.6 M parameters and few tokens, for CPUs")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help="those to run")
    parser.add_argument(
        "--start", type=Path, help="folder of an exported model that all runs begin with, instead of random weights"
    )


if __name__ == "__main__":
    run_command(__doc__, list_runs, write_report, f"{BASELINE}/*", add_options)
