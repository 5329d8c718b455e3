"""Path-star graphs: which objective learns to plan, after how many graphs, and which control explains it.

    python -m research.pathstar run OUT --group objectives --per_gpu 7
    python -m research.pathstar report OUT research/experiments/objectives

`run` makes the runs of a group that OUT does not hold yet; cut short, the same command goes on. A run is ended when a validation
shows an exact match of 99.5 % on each size. `report` writes those of flame-compare, one for each size and length. Every run is
`configs/pathstar.toml` (in the laptop groups `configs/pathstar_cpu.toml`) with the options that its folder's config.toml shows.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

from flame.compare.metrics import Metric
from flame.compare.results import read_rows
from flame.data.tasks.pathstar import parse_sizes
from research.command import Planned, compare_runs, list_folders, run_command

SOLVED = Metric("validation_exact_match", is_higher_better=True, goal=0.99, stop_at=0.995)
"""Exact match on held-out graphs. A run is over at `stop_at`, of each size where there are several; `goal` counts as solved."""
DIAGNOSTICS = ("validation_ce_loss", "validation_first_branch")
GRAPHS_A_STEP = 1024
STEPS = {"3x3": 600, "3x5": 1000, "5x3": 400, "5x5": 1500, "2x10": 2000, "7x7": 2000, "10x10": 5000}
"""Longest run on each size."""
PUBLISHED_SIZES = ("3x3", "3x5", "5x3", "5x5")
SMALLEST_SIZE = "5x3"
"""On which next-token training stays at chance."""

Options = dict[str, object]
OBJECTIVES: dict[str, Options] = {
    "next_token": {"objective.name": "next_token"},
    "mtp-4": {"objective.name": "mtp"},
    "top": {"objective.name": "top"},
    "fsp_bow": {"objective.name": "fsp_bow"},
    "future": {},
}
MTP_2: Options = {"objective.name": "mtp", "mtp.tokens": 2}
SELF: Options = {"future_encoder.target": "self", "future_encoder.target_shift": 1, "future_encoder.loss_weight": 1.0}
"""The trainer's default target, at the weight that suits it here. Controls and settings are variants of it."""
WITH_DUPLICATES: Options = {"future_encoder.exclude_duplicates": False}
TARGETS: dict[str, Options] = {
    "target self": SELF,
    "target random": SELF | {"future_encoder.target": "random"},
    "target ema": SELF | {"future_encoder.target": "ema"},
    "target mean_embedding": SELF | {"future_encoder.target": "mean_embedding"},
    "target causal": SELF | {"future_encoder.target": "causal"},
    "target_shift 0": SELF | {"future_encoder.target_shift": 0},
    "bilinear": SELF | {"future_encoder.estimator_type": "bilinear"},
}
CONTROLS: dict[str, Options] = TARGETS | {
    "next_token": OBJECTIVES["next_token"],
    "target shuffled": SELF | {"future_encoder.target": "shuffled"},
    "predictor sees embedding": SELF | {"future_predictor.input": "embedding"},
    "cosine": SELF | WITH_DUPLICATES | {"future_encoder.estimator_type": "cosine"},
    "smooth_l1": SELF | WITH_DUPLICATES | {"future_encoder.estimator_type": "smooth_l1"},
}
SETTINGS: dict[str, Options] = {
    "target self, 600 steps": {},
    "loss_weight 0.1": {"future_encoder.loss_weight": 0.1},
    "loss_weight 0.3": {"future_encoder.loss_weight": 0.3},
    "loss_weight 3": {"future_encoder.loss_weight": 3.0},
    "loss_weight 3, temperature 0.1": {"future_encoder.loss_weight": 3.0, "future_encoder.temperature": 0.1},
    "temperature 0.02": {"future_encoder.temperature": 0.02},
    "temperature 0.1": {"future_encoder.temperature": 0.1},
    "learned temperature": {"future_encoder.learnable_temperature": True},
    "future_k 1": {"future_encoder.future_k": 1},
    "target_shift 2": {"future_encoder.target_shift": 2},
    "linear head": {"future_predictor.head_type": "linear"},
    "learning rate 3e-3": {"optimizer.lr": 3e-3},
    "with duplicates": WITH_DUPLICATES,
    "other documents only": {"future_encoder.exclude_neighbors": 64},
}
BASELINE_SETTINGS: dict[str, Options] = {
    f"{name}, weight {weight}": OBJECTIVES[name] | {f"{OBJECTIVES[name]['objective.name']}.loss_weight": weight}
    for name, weight in (*product(("mtp-4", "top", "fsp_bow"), (0.3, 3.0)), ("fsp_bow", 0.03))
}
MUON: Options = {"optimizer.name": "Muon"}
WEIGHT_1: Options = {"future_encoder.loss_weight": 1.0}
CPU_SELF: Options = {"future_encoder.target": "self", "future_encoder.loss_weight": 0.3}
CPU_MANY_LABELS: Options = {"model.config": "configs/models/pathstar_cpu_40.json", "pathstar.labels": 40, "training.steps": 1500}
MANY_LABELS: Options = {"model.config": "configs/models/pathstar_100.json", "pathstar.labels": 100}
HARD: dict[str, Options] = {
    "2x10": {},
    "7x7": MANY_LABELS | {"training.seq_len": 512 * parse_sizes("7x7")[0].num_tokens},
    "10x10": MANY_LABELS | {"training.seq_len": 256 * parse_sizes("10x10")[0].num_tokens},
}
HARD_SMALL_STEPS: dict[str, Options] = {
    "7x7": MANY_LABELS | {"training.seq_len": 256 * parse_sizes("7x7")[0].num_tokens, "training.steps": 6000},
    "10x10": MANY_LABELS | {"training.seq_len": 128 * parse_sizes("10x10")[0].num_tokens, "training.steps": 15_000},
}
"""Half the graphs a step, and more of them in all."""
SMALL_STEPS: Options = {
    "lr_scheduler.warmup_steps": 600,
    "training.num_workers": 1,  # which takes seconds to start: no matter in runs of many minutes
    "validation.interval": 100,
    "validation.num_sequences": 8,
}
HARD_SETTINGS: dict[str, Options] = {
    "Muon": MUON,
    "loss_weight 1": WEIGHT_1,
    "loss_weight 1, Muon": WEIGHT_1 | MUON,
    "loss_weight 1, learning rate 3e-3": WEIGHT_1 | {"optimizer.lr": 3e-3},
}
"""What may shorten the wait until edges are looked up."""
HARD_MIX = ("7x7,10x10", "3x3,5x5,7x7,10x10")
"""The sizes that are validated on, and those trained on: small graphs are cheap, and an edge is looked up alike in all. The
report counts graphs of all sizes, so compare with runs on one size by FLOPs."""
LONGER_MIX: Options = MANY_LABELS | {"training.steps": 6000}
"""One run was at 97.7 % after 3,500 steps of the mix."""
FIXED_SET: Options = {"pathstar.graphs": 300_000}
SLOW_START: Options = {"lr_scheduler.warmup_steps": 300}
SWEEP: Options = {"training.steps": 600}


def build_mix(names: str) -> Options:
    """Training on graphs of several sizes, 512 a step."""
    return {"training.dataset_name": names, "training.seq_len": 512 * find_mean_tokens(names), "validation.num_sequences": 4}


def find_mean_tokens(names: str) -> int:
    """Tokens of a graph of these sizes, rounded down."""
    sizes = parse_sizes(names)
    return sum(size.num_tokens for size in sizes) // len(sizes)


GROUPS: dict[str, list[tuple[str, str, Options]]] = {
    "objectives": [
        (size, name, options) for size, (name, options) in product(PUBLISHED_SIZES, (OBJECTIVES | {"target self": SELF}).items())
    ],
    "slow_start": [("5x5", f"{name}, warm-up 300", options | SLOW_START) for name, options in OBJECTIVES.items()],
    "weights": [("5x5", name, options) for name, options in (BASELINE_SETTINGS | {"future, weight 1.0": WEIGHT_1}).items()],
    "weight_1": [
        *((size, "future, weight 1.0", WEIGHT_1) for size in ("3x3", "5x3", "3x5", ",".join(PUBLISHED_SIZES))),
        ("5x5", "future, weight 1.0, 300k graphs", WEIGHT_1 | FIXED_SET),
        ("2x10", "future, weight 1.0", WEIGHT_1 | SLOW_START),
    ],
    "hard": [
        (size, name, OBJECTIVES[name] | SLOW_START | options) for (size, options), name in product(HARD.items(), OBJECTIVES)
    ],
    "hard_small_steps": [
        (size, f"{name}, small steps", OBJECTIVES[name] | options | SMALL_STEPS)
        for (size, options), name in product(HARD_SMALL_STEPS.items(), OBJECTIVES)
    ],
    # At step 6,000 one of five is at 54 %; at step 9,000 it is at 55 %.
    "hard_longer": [("7x7", "future, 9,000 small steps", HARD_SMALL_STEPS["7x7"] | SMALL_STEPS | {"training.steps": 9000})],
    "hard_settings": [
        ("10x10", f"future, {name}", HARD["10x10"] | SLOW_START | options) for name, options in HARD_SETTINGS.items()
    ],
    "hard_mixed": [
        (HARD_MIX[0], f"{name}, smaller graphs too", OBJECTIVES[name] | SLOW_START | LONGER_MIX | build_mix(HARD_MIX[1]))
        for name in ("future", "next_token", "top")
    ],
    "fixed": [("5x5", f"{name}, 300k graphs", options | FIXED_SET) for name, options in OBJECTIVES.items()],
    "mixed": [(",".join(PUBLISHED_SIZES), name, options) for name, options in OBJECTIVES.items()],
    "controls": [(SMALLEST_SIZE, name, options) for name, options in CONTROLS.items()],
    # The controls that are not stuck there, where plans are longer.
    "targets": [(size, name, options) for size, (name, options) in product(("3x5", "5x5"), TARGETS.items())],
    "settings": [("5x5", name, SELF | options | SWEEP) for name, options in SETTINGS.items()],
}
"""Size, variant and its options."""
LAPTOP_GROUPS: dict[str, dict[str, Options]] = {
    "laptop": {name: {"objective.name": name} for name in ("future", "next_token")},
    "laptop_baselines": {name: OBJECTIVES[name] for name in ("mtp-4", "top", "fsp_bow")} | {"mtp-2": MTP_2},
    "laptop_baseline_weights": BASELINE_SETTINGS,
    "laptop_weights": {"loss_weight 1": WEIGHT_1, "loss_weight 1, 40 labels": WEIGHT_1 | CPU_MANY_LABELS},
    "laptop_targets": {
        "target self": CPU_SELF,
        "target self, target_shift 1": CPU_SELF | {"future_encoder.target_shift": 1},
        "target random": CPU_SELF | {"future_encoder.target": "random"},
        "target random, target_shift 1": CPU_SELF | {"future_encoder.target": "random", "future_encoder.target_shift": 1},
        "target ema, target_shift 1": CPU_SELF | {"future_encoder.target": "ema", "future_encoder.target_shift": 1},
    },
    # One change each to "future"; a regression has no negatives that could be duplicates.
    "laptop_settings": {
        **{f"temperature {value}": {"future_encoder.temperature": value} for value in (0.02, 0.1, 0.2)},
        "learned temperature": {"future_encoder.learnable_temperature": True},
        "linear head": {"future_predictor.head_type": "linear"},
        "gated head": {"future_predictor.head_type": "gated"},
        "with duplicates": WITH_DUPLICATES,
        "bilinear": {"future_encoder.estimator_type": "bilinear"},
        **{
            f"{name}, weight {weight}": WITH_DUPLICATES
            | {"future_encoder.estimator_type": name, "future_encoder.loss_weight": weight}
            for name, weight in product(("cosine", "smooth_l1"), (3.0, 30.0))
        },
    },
    # Of two layers with a window of one token, so that the summary at "=" holds center and first node, and not the goal.
    "laptop_window": {
        "future_k 1": {"future_encoder.future_k": 1},
        "future_k 1, 40 labels": {"future_encoder.future_k": 1} | CPU_MANY_LABELS,
    },
    # The center and the goal, which are known, tell 256 graphs over 40 labels apart.
    "laptop_labels": {
        f"{name}, 40 labels": options | CPU_MANY_LABELS
        for name, options in {
            "next_token": OBJECTIVES["next_token"],
            "top": OBJECTIVES["top"],
            "fsp_bow": OBJECTIVES["fsp_bow"],
            "future": OBJECTIVES["future"],
            "target self": {"future_encoder.target": "self"},
            "target ema, 0.999": {"future_encoder.target": "ema", "future_encoder.ema_decay": 0.999},
            "target ema, 0.9999": {"future_encoder.target": "ema", "future_encoder.ema_decay": 0.9999},
            "target mean_embedding": {"future_encoder.target": "mean_embedding"},
            "loss_weight 0.3": {"future_encoder.loss_weight": 0.3},
            "target_shift 1": {"future_encoder.target_shift": 1},
        }.items()
    },
}
"""Those that run on CPUs, with `--per_gpu 2` on two cores: `configs/pathstar_cpu.toml` under a variant."""


def list_runs(group: str, seed: int) -> list[Planned]:
    """The runs of a group."""
    if group in LAPTOP_GROUPS:
        return [build_laptop_run(name, options, seed) for name, options in LAPTOP_GROUPS[group].items()]
    return [build_run(size, name, options, seed) for size, name, options in GROUPS[group]]


def build_laptop_run(name: str, options: Options, seed: int) -> Planned:
    base: Options = {
        "job.config_file": "configs/pathstar_cpu.toml",
        "checkpoint.enable_checkpoint": False,
    }
    return Planned("2x3", name, seed, base | options, (SOLVED,))


def build_run(size: str, name: str, options: Options, seed: int) -> Planned:
    """A run on graphs of one size, or of several in one pack, under one variant."""
    base: Options = {
        "job.config_file": "configs/pathstar.toml",
        "job.description": name,
        "training.dataset_name": size,
        "validation.dataset_name": size,
        "training.seq_len": GRAPHS_A_STEP * find_mean_tokens(size),
        "training.steps": max(STEPS[each] for each in size.split(",")),
        "pathstar.seed": seed,
        "training.num_workers": 0,
        "validation.interval": 25,
        "validation.num_sequences": 2,
        "checkpoint.enable_checkpoint": False,
        "metrics.diagnostics_interval": 100,
    }
    return Planned(size.replace(",", "+"), name, seed, base | options, (SOLVED,))


def write_report(runs: Path, out: Path) -> None:
    """Also of each size by itself, where a run has told several apart."""
    logged = {name for folder in list_folders(runs) for row in read_rows(folder) for name in row}
    parts = [replace(SOLVED, name=name) for name in sorted(logged) if name.startswith(f"{SOLVED.name}/")]
    metrics = (SOLVED, *parts, *(Metric(name, name.endswith("branch")) for name in DIAGNOSTICS))
    compare_runs(runs, out, metrics, baseline="next_token", by_length=True)


def list_all(arguments: argparse.Namespace) -> list[Planned]:
    """One seed of all groups before the next: cut short, each variant has about as many. What two groups share is made once."""
    runs = {run.name: run for seed in arguments.seeds for group in arguments.group for run in list_runs(group, seed)}
    return [run for name, run in runs.items() if any(fnmatchcase(name, f"*{text}*") for text in arguments.only)]


def add_options(parser: argparse.ArgumentParser) -> None:
    names = [*GROUPS, *LAPTOP_GROUPS]
    told = f"one or more of {', '.join(names)} (what each holds: research/pathstar.py)"
    parser.add_argument("--group", nargs="+", required=True, choices=names, metavar="GROUP", help=told)
    only = "of the groups, runs whose folder holds one of these texts; * stands for any text"
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help=only)


if __name__ == "__main__":
    run_command(__doc__, list_all, write_report, add_options)
