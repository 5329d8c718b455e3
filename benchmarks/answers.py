"""What a step gains where the anti-causal pass reads answers alone: steps that do and steps that read the whole pack, in turns.

    python -m benchmarks.answers OUT --job.config_file configs/pathstar.toml

Further options are the trainer's. Medians of a number of rounds with lowest and highest.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from flame.compare.tables import format_table, show_range
from flame.data.batch import PackedBatch
from flame.errors import UserError
from flame.objectives.future import summaries
from flame.objectives.future.answer_suffixes import Suffixes, cut_suffixes
from flame.objectives.future.options import FutureOptions
from flame.objectives.registry import choose_objective
from flame.runtime.distributed import end_processes, set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options

WARMUP = 3
KINDS = ("answers", "whole pack")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="folder to write answers.md to")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each kind")
    arguments, options = parser.parse_known_args(argv)
    options += ["--job.dump_folder", str(arguments.out / "run"), "--metrics.log_freq", "1000000"]
    set_single_process_defaults()
    try:
        config = read_options([*options, "--checkpoint.enable_checkpoint", "false"], 1)
    except UserError as error:
        parser.error(str(error))
    objective = choose_objective(config)
    is_future = objective is not None and objective.options is FutureOptions
    if not is_future or config.get(FutureOptions).target in ("causal", "mean_embedding") or config.training.loss_on != "answer":
        parser.error('no step reads answers alone: training.loss_on must be "answer", and summaries those of an anti-causal pass')
    trainer = Trainer(config)
    trainer._resume()
    trainer._open_run()
    samples: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(WARMUP + arguments.rounds):
        for kind in KINDS:
            samples[kind].append(time_step(trainer, kind))
    trainer._close_run()
    end_processes()
    answers, whole = (samples[kind][WARMUP:] for kind in KINDS)
    ratios = [own / other for own, other in zip(answers, whole, strict=True)]
    row = [*(show_range([1000 * one for one in times], "{:.1f}") for times in (answers, whole)), show_range(ratios, "{:.3f}")]
    table = "\n".join(format_table(["answers, ms a step", "whole pack, ms a step", "answers / whole pack"], [row]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "answers.md").write_text(table + "\n")
    print(table)


def cut_or_exit(batch: PackedBatch) -> Suffixes:
    suffixes = cut_suffixes(batch)
    if suffixes is None:
        raise SystemExit("answers are more than half of a packed sequence: there is nothing to compare")
    return suffixes


def time_step(trainer: Trainer, kind: str) -> float:
    """Seconds of one step, to the end of what it has asked of the GPU."""
    with patch.object(summaries, "cut_suffixes", cut_or_exit if kind == "answers" else lambda _: None):
        started = time.perf_counter()
        trainer.train_step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started


if __name__ == "__main__":
    main(sys.argv[1:])
