"""Sibling discovery: what models trained under each objective write, sampled from their exported weights.

    python -m research.siblings run OUT --per_gpu 4
    python -m research.siblings report OUT research/experiments/siblings
    python -m research.siblings run OUT2 --laptop --per_gpu 2

`run` makes the runs that OUT does not hold yet, each `configs/siblings.toml` under one objective and seed. `report` draws 4,096
texts from each model at temperature 1 and judges them: two siblings and their parent, a pair that is held out, and
one that no earlier text has. What it finds stays in the run's folder, which can do without its model from then on. Of all pairs
1 in 8 is held out, so a model that has learned families and not pairs has a held-out share of an eighth of its coherent one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import tomli
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from flame.compare.results import read_rows
from flame.compare.tables import format_table, show_range
from flame.data.tasks.siblings import NUM_TOKENS, SamplesJudged, SiblingsOptions, judge_samples
from flame.logging.console import find_row_kind
from flame.trainer.run_record import CONFIG_FILE
from research.command import Planned, list_ended, run_command

TASK = "siblings"
NUM_SAMPLES = 4096
JUDGED_FILE = "judged.json"
OBJECTIVES: dict[str, dict[str, object]] = {
    "next_token": {"objective.name": "next_token"},
    "mtp-4": {"objective.name": "mtp"},
    "top": {"objective.name": "top"},
    "fsp_bow": {"objective.name": "fsp_bow", "fsp_bow.loss_weight": 0.01},
    "future": {},
    "future, target_shift 0": {"future_encoder.target_shift": 0},
    "future, random target": {"future_encoder.target": "random"},
    "future, random target, target_shift 0": {"future_encoder.target": "random", "future_encoder.target_shift": 0},
}
LAPTOP_SIZE: dict[str, object] = {
    "model.config": "configs/models/siblings_cpu.json",
    "siblings.children": 100,
    "siblings.pairs": 10_000,
    "training.seq_len": 5120,
    "training.steps": 200,
    "training.compile": False,
    "future_encoder.max_anchors": 1024,
    "validation.interval": 20,
    "checkpoint.interval": 200,
}


def list_runs(arguments: argparse.Namespace) -> list[Planned]:
    """One seed of all objectives before the next."""
    size = LAPTOP_SIZE if arguments.laptop else {}
    base: dict[str, object] = {"job.config_file": "configs/siblings.toml", "training.num_workers": 0} | size
    return [
        Planned(TASK, name, seed, base | {"siblings.seed": seed} | options)
        for seed in arguments.seeds
        for name, options in OBJECTIVES.items()
    ]


@torch.no_grad()
def draw_samples(folder: Path, options: SiblingsOptions) -> list[list[int]]:
    """Texts of an exported model behind the separator, at temperature 1."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    generator = torch.Generator(device).manual_seed(options.seed)
    ids = torch.full((NUM_SAMPLES, 1), options.parents * (options.children + 1), device=device)
    for _ in range(NUM_TOKENS - 1):
        probabilities = model(ids).logits[:, -1].float().softmax(dim=-1)
        ids = torch.cat([ids, probabilities.multinomial(1, generator=generator)], dim=1)
    return ids[:, 1:].tolist()


def write_report(runs: Path, out: Path) -> None:
    """Write `siblings.md` into a folder."""
    disable_progress_bar()  # one for each model that is loaded
    columns = ["objective", "seeds", "coherent, %", "held out, %", "unique, %"]
    columns += ["cross entropy of held-out pairs, nats a token, at the end", "at its lowest", "at step"]
    rows = []
    for name in OBJECTIVES:
        folders = list_ended(runs, TASK, name)
        if not folders:
            continue
        judged = [_judge(folder) for folder in folders]
        shares = [show_range([100 * getattr(one, field) for one in judged], "{:.2f}") for field in SamplesJudged._fields]
        validations = [[row for row in read_rows(folder) if find_row_kind(row) == "validation"] for folder in folders]
        lowest = [min(rows, key=lambda row: row["validation_ce_loss"]) for rows in validations]
        losses = [
            show_range([rows[-1]["validation_ce_loss"] for rows in validations], "{:.3f}"),
            show_range([row["validation_ce_loss"] for row in lowest], "{:.3f}"),
            show_range([row["step"] for row in lowest], "{:.0f}"),
        ]
        rows.append([name, str(len(folders)), *shares, *losses])
    table = "\n".join(format_table(columns, rows))
    (out / "siblings.md").write_text(table + "\n")
    print(table)


def _judge(folder: Path) -> SamplesJudged:
    """What the model of a run writes."""
    path = folder / JUDGED_FILE
    if not path.exists():
        options = SiblingsOptions(**tomli.loads((folder / CONFIG_FILE).read_text())["siblings"])
        judged = judge_samples(draw_samples(folder / "hf", options), options)
        path.write_text(json.dumps(judged._asdict()) + "\n")
    return SamplesJudged(**json.loads(path.read_text()))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--laptop", action="store_true", help="100 children each and a model of two layers, for CPUs")


if __name__ == "__main__":
    run_command(__doc__, list_runs, write_report, add_options)
