"""What is to be compared: a TOML file with tasks, arms, seeds, one budget and metrics. Imports no torch."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flame.compare.metrics import Metric, find_meant, list_known, read_better
from flame.config.table import format_toml
from flame.config.toml_file import read_toml
from flame.config.training import LENGTHS
from flame.errors import UserError

Options = dict[str, Any]
"""Of the trainer, by dotted key."""
BUDGETS = ("tokens", "flops", "seconds")
TABLES = ("compare", "tasks", "arms", "metrics")
METRIC_KEYS = ("better", "goal", "stop_at")
DEFAULT_METRIC = "validation_ce_loss"
LARGEST_SEED = 2**31 - 1
RESERVED = {
    **{f"training.{name}": "the budget is set in [compare]" for name in LENGTHS},
    "training.seed": "the seeds are set in [compare]",
    "job.dump_folder": "the runs lie below compare.out",
    "checkpoint.load_step": "a run of a comparison goes on from its newest checkpoint",
}
CONFIG_KEY = "job.config_file"


class Budget(NamedTuple):
    """How long each run trains."""

    kind: str
    """One of `BUDGETS`."""
    amount: float

    def __str__(self) -> str:
        units = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training steps"}
        return f"{self.amount:,.0f} {units[self.kind]}" if self.kind != "flops" else f"{self.amount:g} FLOPs"


@dataclass(frozen=True)
class Spec:
    """A comparison. Each task is trained under each arm with each seed."""

    path: str
    out: Path
    seeds: tuple[int, ...]
    budget: Budget
    tasks: Mapping[str, Options]
    """Of each task its configuration file, under `CONFIG_KEY`, and what it changes there."""
    arms: Mapping[str, Options]
    baseline: str
    """The arm that others are compared with."""
    metrics: tuple[Metric, ...]
    seeded: tuple[str, ...] = ()
    """Options beside `training.seed` that take the seed."""
    parallel: int = 1
    """Runs at the same time on each group of GPUs or, without GPUs, on this machine."""
    gpus_per_run: int = 1
    """Processes of a run, one a GPU."""


def parse_spec(path: str) -> tuple[Spec, list[str]]:
    """Read a comparison.

    Returns:
        what the file says, with stand-ins where it is wrong; and a line for each mistake, but for those in the trainer's options.

    Raises:
        UserError: it is no TOML file.
    """
    try:
        tree = read_toml(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable TOML file: {getattr(error, 'strerror', None) or error}") from None
    faults: list[str] = []
    for name, value in tree.items():
        if name not in TABLES:
            faults.append(f"[{name}] ({path}): no such table{suggest(name, TABLES)}")
        elif not isinstance(value, dict):
            faults.append(f"{name} ({path}): must be a table, written [{name}]")
    tables = {name: table if isinstance(table := tree.get(name, {}), dict) else {} for name in TABLES}
    values = _read_values(tables["compare"], path, faults)
    tasks = {name: _read_options(table, f"tasks.{name}", path, faults) for name, table in tables["tasks"].items()}
    arms = {name: _read_options(table, f"arms.{name}", path, faults) for name, table in tables["arms"].items()}
    for kind, names in (("tasks", tasks), ("arms", arms)):
        faults += [f'[{kind}."{name}"] ({path}): {fault}' for name in names if (fault := find_name_fault(name))]
    if not tasks:
        faults.append(f'{path}: no [tasks.NAME]: write one with config = "FILE.toml"')
    for name, task in tasks.items():
        config = task.pop("config", None)
        if not isinstance(config, str) or not config:
            faults.append(f'tasks.{name}.config ({path}): must name the configuration file of the runs, such as "run.toml"')
        else:
            task[CONFIG_KEY] = config
    if len(arms) < 2:
        faults.append(f"{path}: {len(arms)} [arms.NAME]: a comparison needs two or more")
    baseline = values.get("baseline", next(iter(arms), ""))
    if arms and baseline not in arms:
        faults.append(f'compare.baseline = "{baseline}" ({path}): no such arm{suggest(baseline, arms)}')
    given = [kind for kind in BUDGETS if kind in tables["compare"]]
    if len(given) != 1:
        found = " and ".join(f"compare.{kind}" for kind in given) or "none"
        faults.append(f"{path}: give one budget, compare.tokens, flops or seconds; given is {found}")
    metrics = _read_metrics(tables["metrics"], path, faults)
    budget = Budget(given[0], values[given[0]]) if given and given[0] in values else Budget("tokens", 1)
    spec = Spec(
        path=path,
        out=Path(os.path.expanduser(values.get("out", "exp/compare"))),
        seeds=tuple(values.get("seeds", (0,))),
        budget=budget,
        tasks=tasks,
        arms=arms,
        baseline=baseline,
        metrics=metrics,
        seeded=tuple(values.get("seeded", ())),
        parallel=values.get("parallel", 1),
        gpus_per_run=values.get("gpus_per_run", 1),
    )
    return spec, faults


def suggest(name: object, known: Collection[str]) -> str:
    """End of a line about an unknown name."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {near[0]}?" if near else f", there are {', '.join(known)}"


def find_name_fault(name: str) -> str | None:
    """What keeps a name from being a folder and a cell of a table."""
    if not name or name.startswith(".") or any(sign in name for sign in "/\\|") or not name.isprintable() or len(name) > 100:
        return "a name is a folder: without / and |, not empty, of at most 100 characters, and not begun with a dot"
    return None


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested tables."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_options(table: Any, name: str, path: str, faults: list[str]) -> Options:
    if not isinstance(table, dict):
        faults.append(f"{name} ({path}): must be a table of options, written [{name}]")
        return {}
    options = dict(flatten(table))
    for key in [key for key in options if key in RESERVED or key == CONFIG_KEY]:
        reason = RESERVED.get(key, "write config = FILE in [tasks.NAME]")
        faults.append(f"{key} = {format_toml(options.pop(key))} ([{name}] of {path}): not allowed here, {reason}")
    return options


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_list_of_seeds(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) > 0
    return (
        is_list
        and all(isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= LARGEST_SEED for seed in value)
        and len(set(value)) == len(value)
    )


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "out": (_is_text, "text, the folder of the runs and of the report"),
    "seeds": (_is_list_of_seeds, f"a list of different integers from 0 to {LARGEST_SEED}, such as [1, 2, 3]"),
    "tokens": (_is_count, "an integer > 0"),
    "flops": (_is_amount, "a number > 0"),
    "seconds": (_is_amount, "a number > 0"),
    "baseline": (_is_text, "the name of an arm"),
    "seeded": (_is_list_of_texts, 'a list of options that take the seed, such as ["pathstar.seed"]'),
    "parallel": (_is_count, "an integer > 0"),
    "gpus_per_run": (_is_count, "an integer > 0"),
}
"""Of `[compare]`: what a value may be."""


def _read_values(table: Mapping[str, Any], path: str, faults: list[str]) -> dict[str, Any]:
    """The right values of `[compare]`; for each other one a line is added."""
    values = {}
    for key, value in table.items():
        if key not in _KEYS:
            faults.append(f"compare.{key} ({path}): no such key{suggest(key, list(_KEYS))}")
        elif not _KEYS[key][0](value):
            faults.append(f"compare.{key} = {format_toml(value)} ({path}): allowed is {_KEYS[key][1]}")
        else:
            values[key] = value
    faults += [f"compare.{key} ({path}) is not set: give {_KEYS[key][1]}" for key in ("out", "seeds") if key not in table]
    return values


def _read_metrics(table: Mapping[str, Any], path: str, faults: list[str]) -> tuple[Metric, ...]:
    metrics = []
    for name, values in (table or {DEFAULT_METRIC: {}}).items():
        label, before = f"metrics.{name}", len(faults)
        if not isinstance(values, dict):
            faults.append(f'{label} ({path}): must be a table, written [metrics."{name}"]')
            continue
        faults += [f"{label}.{key} ({path}): no such key{suggest(key, METRIC_KEYS)}" for key in values if key not in METRIC_KEYS]
        better = values.get("better", read_better(name))
        if better is None:
            advice = difflib.get_close_matches(name, list_known(), n=1)
            guess = f"did you mean {advice[0]}? Else " if advice else ""
            faults.append(f'{label} ({path}): {guess}say better = "lower" or better = "higher": it is not known of this metric')
        elif better not in ("lower", "higher"):
            faults.append(f'{label}.better = {format_toml(better)} ({path}): allowed is "lower" or "higher"')
        elif meant := find_meant(name):
            faults.append(f"{label} ({path}): no such metric, did you mean {meant}?")
        for key in ("goal", "stop_at"):
            value = values.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
                faults.append(f"{label}.{key} = {format_toml(value)} ({path}): allowed is a finite number")
        metric = Metric(name, better == "higher", values.get("goal"), values.get("stop_at"))
        metrics.append(metric)
        if len(faults) == before and metric.is_goal_after_stop():
            end, bound = format_toml(metric.stop_at), "<=" if metric.is_higher_better else ">="
            faults.append(
                f"{label}.goal = {format_toml(metric.goal)} ({path}): runs end at stop_at = {end}, before it: allowed is a goal "
                f"{bound} {end}"
            )
    return tuple(metrics)
