"""Collects the options of a run: those of the run itself, of the objectives and of the data sources.

Imports no torch, transformers or datasets: mistakes in options are reported before anything slow is loaded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from flame.config.check import call_rules, find_conflicts, list_unused
from flame.config.help import print_help, render_commented
from flame.config.parse import list_typed, parse_config
from flame.config.run import Metrics
from flame.config.schema import HELD_OUT, NAMED, JobConfig, list_core_sections
from flame.config.table import COMMANDS, DRY_RUN, ESTIMATE, HELP, PRINT_CONFIG, OptionTable, find_unknown_conditions
from flame.config.types import Section
from flame.data.sources.registry import find_data_conflicts, list_sections, list_used, load_user_sections
from flame.errors import UserError
from flame.evaluation.tasks import find_task_conflicts
from flame.logging.run_log import choose_writers
from flame.objectives.options import find_cadence_conflicts
from flame.objectives.registry import BUILT_IN, choose_kind, choose_objective, load_user_objective


def read_options(argv: list[str], world_size: int) -> JobConfig:
    """Resolve the options of a run: defaults < TOML file (`--job.config_file`) < command line.

    `--help`, `--help SECTION`, `--print-config`, `--estimate` and `--estimate GPUS` print and end the process with 0.

    Args:
        argv: command line without the program's name.
        world_size: processes of the run over all machines.

    Raises:
        UserError: one line for each mistake in the file, on the command line and between options.
    """
    asked = [position for position, word in enumerate(argv) if word.partition("=")[0] in HELP]
    if asked:
        print_help(build_table(list_typed(argv)), _find_section(argv[asked[0] :]))
        sys.exit(0)
    if len(commands := [command for command in COMMANDS if command in argv]) > 1:
        raise UserError(f"{' and '.join(commands)} are commands: give one of them")
    if PRINT_CONFIG in argv:
        rest = [word for word in argv if word != PRINT_CONFIG]
        job, table = parse_config(rest, world_size, _find_extensions, lambda job: iter(()))
        for name, kind in table.extensions.items():
            job.extensions.setdefault(name, kind())
        print(render_commented(job, table))
        sys.exit(0)
    if ESTIMATE in argv:
        from flame.trainer.estimate import describe, estimate_run

        rest, gpus = _take_estimate(argv, world_size)
        job = parse_config(rest, gpus, _find_extensions, find_all_conflicts)[0]
        for line in describe(estimate_run(job), job):
            print(line)
        sys.exit(0)
    job = parse_config([word for word in argv if word != DRY_RUN], world_size, _find_extensions, find_all_conflicts)[0]
    job.is_dry_run = DRY_RUN in argv
    return job


def _take_estimate(argv: list[str], world_size: int) -> tuple[list[str], int]:
    """The words without `--estimate [GPUS]`, and the number of GPUs."""
    place = argv.index(ESTIMATE)
    value = argv[place + 1] if len(argv) > place + 1 and not argv[place + 1].startswith("-") else None
    if value is not None and not (re.fullmatch(r"\d{1,9}", value) and int(value) > 0):
        raise UserError(f"{ESTIMATE} {value}: allowed is a number of GPUs above 0")
    return argv[:place] + argv[place + 1 + (value is not None) :], int(value or world_size)


def _find_section(words: list[str]) -> str | None:
    """What `--help` is asked about: `--help SECTION` or `--help=SECTION`; None for everything."""
    _, equals, section = words[0].partition("=")
    if equals:
        return section
    return words[1] if len(words) > 1 and not words[1].startswith("-") else None


def build_table(values: Mapping[str, Any] | None = None) -> OptionTable:
    """All options.

    Args:
        values: typed values by key. They may name a user's objective or sources, whose sections are then included.

    Raises:
        UserError: one of these cannot be loaded.
    """
    sections, faults = _find_extensions(values or {})
    if faults:
        raise UserError(*faults)
    return OptionTable(sections)


def _find_extensions(values: Mapping[str, Any]) -> tuple[dict[str, type[Section]], list[str]]:
    """See `parse.FindExtensions`."""
    sections: dict[str, type[Section]] = {}
    for kind in BUILT_IN.values():
        sections |= kind.sections
    sections |= list_sections()
    faults: list[str] = []

    def add(found: Mapping[str, type[Section]], what: str) -> None:
        for name, section in found.items():
            if sections.get(name) is section:
                continue  # one class in two places is one table
            if name in sections or name in list_core_sections() or name in NAMED:
                faults.append(f'{what} declares the section "{name}", which is taken: choose another name')
            elif not name.isidentifier():
                faults.append(f'{what} declares the section "{name}": it must be a Python identifier')
            else:
                sections[name] = section

    built_in = set(sections)
    name, path = values.get("objective.name"), values.get("objective.path")
    try:
        user = load_user_objective(name if isinstance(name, str) else None, path if isinstance(path, str) else "")
        if user is not None:
            add(user.sections, f'objective.path = "{path}"' if path else f'objective.name = "{name}"')
    except UserError as error:
        faults += error.lines
    datasets = [(key.removesuffix(".dataset"), value) for key, value in values.items() if key.endswith(".dataset")]
    try:
        add(load_user_sections((section, value) for section, value in datasets if isinstance(value, str)), "a data source")
    except UserError as error:
        faults += error.lines
    known = {**list_core_sections(), **sections}
    for section in sections.keys() - built_in:
        faults += find_unknown_conditions(section, known)
    return sections, faults


def find_all_conflicts(job: JobConfig) -> Iterator[str]:
    """Yield one line for each combination of options that cannot run, or cannot run on this machine."""
    yield from find_conflicts(job)
    yield from find_data_conflicts(job)
    yield from find_task_conflicts(job)
    try:
        choose_writers(job.metrics)  # a file of the user's own is loaded
    except UserError as error:
        yield from error.lines
    try:
        kind = choose_objective(job)
    except UserError as error:
        yield from error.lines
        return
    for name, section in (kind.sections if kind else {}).items():
        yield from call_rules(job.get(section).find_conflicts, job, name)
    if kind is not None:
        yield from find_cadence_conflicts(job, job.get(kind.options))
    if job.experimental.freeze_lm_for_infonce and not (kind and kind.options.trains_without_lm):
        yield (
            "experimental.freeze_lm_for_infonce = true leaves nothing to train: it needs an objective that trains modules of its "
            'own, such as objective.name = "future", with a loss_weight above 0'
        )


def list_idle_options(job: JobConfig) -> list[str]:
    """Options that are set but have no effect in this run."""
    kind = choose_objective(job)
    used = set(kind.sections) if kind else set()
    user = load_user_objective(job.objective.name, job.objective.path)
    others = [name for each in (*BUILT_IN.values(), *filter(None, [user])) for name in each.sections if name not in used]
    idle_sources, used_by_corpus = list_used(job)
    unread = {f"{HELD_OUT}.{name}" for name in job.held_out} - set(job.held_out_corpora)
    idle = list_unused(job, {*others, *idle_sources, *unread}, used_by_corpus)
    idle = [key for key in idle if not (key.endswith(".loss_weight") and kind is None and _switches_off(job, key))]
    chosen = choose_kind(job)
    if job.objective.path and user is not None and (chosen is None or chosen.name != user.name):
        idle.append("objective.path")
    if job.checkpoint.branch_from and job.checkpoint.initial_load_path:
        idle.append("checkpoint.initial_load_path")
    if kind is None:
        schedule = ("start_step", "warmup_steps", "decay_steps")
        idle += [f"objective.{name}" for name in schedule if getattr(job.objective, name)]
        if job.metrics.diagnostics_interval != Metrics().diagnostics_interval:
            idle.append("metrics.diagnostics_interval")
    return idle


def _switches_off(job: JobConfig, key: str) -> bool:
    """Whether an option is the loss weight of 0 that has turned the chosen objective off."""
    section = key.rpartition(".")[0]
    chosen = choose_kind(job)
    return chosen is not None and section == chosen.options.section and getattr(job.extensions[section], "loss_weight", 1) == 0
