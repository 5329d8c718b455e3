"""The runs of a comparison: their options, checked by the trainer's own rules before any is started. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flame.compare.metrics import OF_ANSWERS, OF_OBJECTIVE, TOTAL, VALIDATION, Metric
from flame.compare.spec import CONFIG_KEY, DEFAULT_METRIC, RESERVED, Budget, Options, Spec, flatten, parse_spec
from flame.config.parse import COMMAND_LINE, list_typed
from flame.config.schema import JobConfig
from flame.config.training import LENGTHS
from flame.errors import UserError
from flame.evaluation.tasks import name_task, split_names
from flame.logging.console import EVALUATION_PREFIX
from flame.objectives.registry import BUILT_IN, choose_objective
from flame.trainer.named_files import hash_named_files
from flame.trainer.options import build_table, read_options
from flame.trainer.run_record import CONFIG_FILE

RECORD_FILE = "compare.json"
"""In the folder of a run: what it was started as."""
SILENT = (CONFIG_KEY, "job.dump_folder", "job.description")
FAR_AWAY = 10**9
SEVERAL = 3
"""Differences that a line about another run names."""


@dataclass(frozen=True)
class Run:
    """One run of the trainer, in a folder of its own below `Spec.out`."""

    task: str
    arm: str
    seed: int
    folder: Path
    options: Options
    """All but those of its length."""
    budget: Budget
    stops: tuple[Metric, ...] = ()
    """Those with a `stop_at`: the run ends once all of them are reached."""
    processes: int = 1
    steps: int | None = None
    """Of a budget in seconds, once it is known how long a step takes."""

    @property
    def name(self) -> str:
        return f"{self.task}/{self.arm}/seed {self.seed}"

    @property
    def length(self) -> Options:
        """The option that says how long the run is."""
        if self.budget.kind == "seconds":
            return {"training.steps": self.steps or FAR_AWAY}
        return {f"training.{self.budget.kind}": self.budget.amount}

    def spell_options(self) -> list[str]:
        """The trainer's command line."""
        return spell(self.options | self.length | {"job.dump_folder": str(self.folder)})

    def describe(self) -> dict[str, Any]:
        """What makes it this run and no other."""
        options = dict(flatten(resolve(self).to_dict()))
        kept = {key: value for key, value in options.items() if key not in SILENT and not _is_length(key)}
        return {
            "options": json.loads(json.dumps(kept)),
            "files": hash_named_files(options),
            "budget": list(self.budget),
            "steps": self.steps,
            "processes": self.processes,
            "stops": sorted([metric.name, metric.better, metric.stop_at] for metric in self.stops),
        }


def spell(options: Mapping[str, Any]) -> list[str]:
    """Options as arguments of the trainer."""
    values = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in options.items()}
    return [f"--{key}={value}" for key, value in values.items()]


def list_runs(spec: Spec) -> list[Run]:
    """All runs, one seed of everything before the next: cut short, each arm has about as many."""
    stops = tuple(metric for metric in spec.metrics if metric.stop_at is not None)
    return [
        Run(
            task=task,
            arm=arm,
            seed=seed,
            folder=spec.out / task / arm / f"seed-{seed}",
            options=spec.tasks[task] | spec.arms[arm] | dict.fromkeys(("training.seed", *spec.seeded), seed),
            budget=spec.budget,
            stops=stops,
            processes=spec.gpus_per_run,
        )
        for seed in spec.seeds
        for task in spec.tasks
        for arm in spec.arms
    ]


def resolve(run: Run) -> JobConfig:
    """All options of a run, also those of objectives that it does not train.

    Raises:
        UserError: some are wrong.
    """
    words = run.spell_options()
    config = read_options(words, run.processes)
    for name, kind in build_table(list_typed(words)).extensions.items():
        config.extensions.setdefault(name, kind())
    return config


def read_spec(path: str) -> Spec:
    """Read a comparison and check it, also the options of each task and of each arm, as the trainer does.

    Raises:
        UserError: one line for each mistake. Those in options name task or arm.
    """
    spec, faults = parse_spec(path)
    one = {(run.task, run.arm): run for run in list_runs(spec) if run.seed == spec.seeds[0]}
    for task in (name for name in spec.tasks if spec.arms and CONFIG_KEY in spec.tasks[name]):
        first = one[task, next(iter(spec.arms))]
        base = replace(first, options=spec.tasks[task] | {"training.seed": spec.seeds[0]})
        of_arms = {arm: _find_faults(spec, one[task, arm]) for arm in spec.arms}
        of_seeded = [line for lines in of_arms.values() for line in lines if line.split(" = ")[0] in spec.seeded]
        faults += [f"compare.seeded of {spec.path}: {line}" for line in of_seeded]
        # What all arms have is the task's own. What they all set otherwise is none.
        of_task = [line for line in _find_faults(spec, base) if all(line in lines for lines in of_arms.values())]
        faults += [f"[tasks.{task}] of {spec.path}: {line}" for line in of_task]
        for arm in spec.arms:
            of_arm = [line for line in of_arms[arm] if line not in (*of_task, *of_seeded)]
            faults += [f"[arms.{arm}] of {spec.path}, task {task}: {line}" for line in of_arm]
        faults += _find_incomparable(spec, task, [one[task, arm] for arm in spec.arms])
    if faults:
        raise UserError(*dict.fromkeys(faults))
    return spec


def _find_faults(spec: Spec, run: Run) -> list[str]:
    """What is wrong with the options of a run, or keeps it from being measured."""
    try:
        config = read_options(run.spell_options(), run.processes)
    except UserError as error:
        # Of a folder that cannot be made a line speaks later, once for all runs.
        return [line.replace(f" ({COMMAND_LINE})", "") for line in error.lines if not line.startswith("job.dump_folder")]
    return [*_find_shared(config), *_find_unmeasured(spec, config), *_find_untimed(spec, config)]


def _find_shared(config: JobConfig) -> Iterator[str]:
    """A line for what all runs would share, or repeat at each start. The configuration file of a task may set it."""
    checkpoint = config.checkpoint
    if checkpoint.export_to:
        yield (
            f'checkpoint.export_to = "{checkpoint.export_to}": all runs of a comparison would upload to one folder: set it to '
            '"", and upload the models you want with flame-convert-dcp-to-hf --out ADDRESS'
        )
    if checkpoint.load_step is not None:
        yield f"checkpoint.load_step = {checkpoint.load_step}: {RESERVED['checkpoint.load_step']}: remove it"


def _find_unmeasured(spec: Spec, config: JobConfig) -> Iterator[str]:
    """A line for what a metric is of, where the run does not measure it."""
    names = [metric.name for metric in spec.metrics]
    wanted = [name for name in names if name.startswith(VALIDATION)]
    if wanted and not config.validation.interval:
        yield f"validation.interval = 0, and metrics.{wanted[0]} is compared: set it above 0"
    of_answers = [name for name in wanted if name.removeprefix(VALIDATION).partition("/")[0] in OF_ANSWERS]
    if of_answers and config.training.loss_on != "answer":
        yield f'training.loss_on = "{config.training.loss_on}", and metrics.{of_answers[0]} is compared: set it to "answer"'
    wanted = [name for name in names if name.startswith(EVALUATION_PREFIX)]
    if wanted and not config.evaluation.interval:
        yield f"evaluation.interval = 0, and metrics.{wanted[0]} is compared: set it above 0"
        return
    known = [*map(name_task, split_names(config.evaluation.tasks)), *config.held_out]
    for name in wanted:
        if name.removeprefix(EVALUATION_PREFIX).rpartition("/")[0] not in known:
            there = f"there are {', '.join(known)}" if known else "there is nothing"
            yield (
                f"metrics.{name}: nothing of that name is evaluated, {there}: "
                f"name it in evaluation.tasks or as [held_out.NAME], and write {EVALUATION_PREFIX}NAME/METRIC"
            )


def _find_incomparable(spec: Spec, task: str, runs: Sequence[Run]) -> Iterator[str]:
    """A line for each metric whose meaning depends on the objective, where arms train different ones."""
    metrics = [metric.name for metric in spec.metrics if metric.name.removeprefix(VALIDATION) in OF_OBJECTIVE]
    if not metrics:
        return
    trained: dict[str, tuple[Any, ...]] = {}
    for run in runs:
        try:
            config = read_options(run.spell_options(), run.processes)
        except UserError:
            continue  # of its options another line speaks
        kind = choose_objective(config)
        own_code = config.objective.path if kind is not None and kind.name not in BUILT_IN else ""
        trained[run.arm] = () if kind is None else (kind.name, own_code, config.get(kind.options).loss_weight)
    for name in metrics:
        has_weight = name.removeprefix(VALIDATION) == TOTAL
        kinds = {arm: objective if has_weight else objective[:2] for arm, objective in trained.items()}
        first = {kind: arm for arm, kind in reversed(kinds.items())}
        if len(first) > 1:
            different = [arm for arm in kinds if arm in first.values()]
            yield (
                f"metrics.{name} ({spec.path}, task {task}): it means something else under each objective"
                f"{' and loss_weight' * has_weight}, and arms differ in that ({', '.join(different)}): use {DEFAULT_METRIC}"
            )


def _find_untimed(spec: Spec, config: JobConfig) -> Iterator[str]:
    """A line if the time of a step changes over the run in a way that no short run shows."""
    kind = choose_objective(config)
    curriculum = getattr(config.get(kind.options), "curriculum", "none") if kind is not None else "none"
    if spec.budget.kind == "seconds" and kind is not None and curriculum != "none":
        yield (
            f'{kind.options.section}.curriculum = "{curriculum}" changes the time of a step over the run, so that '
            'compare.seconds are no number of steps: allowed is "none", or give compare.tokens or compare.flops'
        )


def check_folders(runs: list[Run]) -> None:
    """Check that no folder holds a run of other options: such runs are not mixed.

    Raises:
        UserError: one line for each that does.
    """
    faults = [line for run in runs if (line := find_other_run(run))]
    if faults:
        raise UserError(*faults)


def find_other_run(run: Run) -> str | None:
    """A line about the run that has this one's folder and is another one; None if there is none."""
    record = read_record(run.folder)
    if record is None:
        if (run.folder / CONFIG_FILE).exists():
            return f'"{run.folder}" holds a run that is not of a comparison: move it away, or choose another compare.out'
        return None
    wanted = run.describe()
    if run.budget.kind == "seconds" and run.steps is None:  # not known yet
        wanted["steps"] = record.get("steps")
    if is_same(record, wanted):
        return None
    return f'"{run.folder}" holds a stale run, with {describe_changes(record, wanted)}: remove it, or choose another compare.out'


def is_same(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a record is of what is wanted now. One of an earlier version does not say what the files held."""
    return {"files": wanted["files"], **record} == wanted


def describe_changes(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How a run's record differs from what is wanted now, in part of a line."""
    before, now = (each.get("options", {}) for each in (record, wanted))
    changes = [
        f"{key} = {before.get(key)} (now {now.get(key)})"
        for key in dict.fromkeys([*now, *before])
        if before.get(key) != now.get(key)
    ]
    told, files = record.get("files", wanted["files"]), wanted["files"]
    changes += [
        f"another content of {key} = {now.get(key)}"
        for key in dict.fromkeys([*files, *told])
        if files.get(key) != told.get(key) and before.get(key) == now.get(key)
    ]
    if wanted["budget"] != record.get("budget"):
        changes.append(f"a budget of {Budget(*record['budget'])} (now {Budget(*wanted['budget'])})")
    elif wanted["steps"] != record.get("steps"):
        changes.append(f"{record.get('steps')} steps for its seconds (now {wanted['steps']})")
    if wanted["processes"] != record.get("processes"):
        changes.append(f"{record.get('processes')} processes (now {wanted['processes']})")
    if wanted["stops"] != record.get("stops"):
        changes.append(f"stop_at of {_show_stops(record.get('stops'))} (now {_show_stops(wanted['stops'])})")
    more = f" and {len(changes) - SEVERAL} more" if len(changes) > SEVERAL else ""
    return ", ".join(changes[:SEVERAL]) + more


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a folder's run was started as; None if none was."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_record(run: Run) -> None:
    """Say in the run's folder what is started there."""
    run.folder.mkdir(parents=True, exist_ok=True)
    temporary = run.folder / f"{RECORD_FILE}.tmp"
    temporary.write_text(json.dumps(run.describe(), indent=1) + "\n")
    temporary.replace(run.folder / RECORD_FILE)


def _show_stops(stops: Sequence[Sequence[Any]] | None) -> str:
    """Those of a record. One of an earlier version has none."""
    return ", ".join(f"{name} {'>=' if better == 'higher' else '<='} {stop}" for name, better, stop in stops or ()) or "nothing"


def _is_length(key: str) -> bool:
    section, _, name = key.rpartition(".")
    return section == "training" and name in LENGTHS
