"""Which modules of an objective are taken from initial weights: those that fit and were trained for the same.

They are taken module by module, or together or not at all (`Objective.modules_belong_together`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from flame.objectives.base import Objective, Task
from flame.weights.plan import Reading, read_plainly
from flame.weights.source import DTYPES, WeightSource

SHOWN = 3


class ModulePlan(NamedTuple):
    """How the modules that are taken are read."""

    readings: dict[str, Reading]
    """By name within the objective."""
    taken: set[str]
    """Names of the modules."""
    lines: list[str]
    """For the log."""


def plan_modules(objective: Objective, found: WeightSource) -> ModulePlan:
    """Plan which of the modules that the objective exports are read.

    A module is taken if the names and shapes of its tensors are the same.

    Args:
        found: modules of an objective with the same name.

    Raises:
        UserError: the file that holds them cannot be read.
    """
    prefixes = tuple(objective.list_exported())
    live = _group(objective.state_dict(), prefixes)
    stored = _group({name: name for name in found.entries}, prefixes)
    modules = sorted(live.keys() | stored.keys())
    own, theirs = objective.describe_task(), _read_task(found.task)
    if theirs is not None and (wrong := _list_differences(theirs.decisive, own.decisive)):
        name, before, now = wrong[0]
        reason = f"they were trained for another {name}, {before}, and this run has {now}"
        return ModulePlan({}, set(), [f"{' and '.join(modules)} of {found.label} are not taken: {reason}"])
    plan = ModulePlan({}, set(), [])
    faults = {module: _find_fault(live[module], stored[module], found) for module in modules}
    misfit = next((module for module in modules if faults[module]), None) if objective.modules_belong_together else None
    for module in modules:
        if faults[module]:
            plan.lines.append(f"{module} of {found.label} does not fit and is not taken: {faults[module]}")
        elif misfit:
            plan.lines.append(f"{module} of {found.label} is not taken either: it belongs to its {misfit}")
        else:
            plan.readings.update({name: read_plainly(found, name) for name in live[module]})
            plan.taken.add(module)
            plan.lines.append(f"{module} from {found.label}: {len(live[module])} tensors")
    if plan.taken:
        plan.lines.extend(_compare(theirs, own, found.label))
        plan.lines.extend(objective.explain_taken(plan.taken))
    return plan


def _read_task(saved: Any) -> Task | None:
    is_task = isinstance(saved, dict) and all(isinstance(saved.get(field), dict) for field in Task._fields)
    return Task(**{field: saved[field] for field in Task._fields}) if is_task else None


def _compare(theirs: Task | None, own: Task, label: str) -> list[str]:
    """Lines for the log."""
    if theirs is None:
        return [f"{label} does not say what they were trained for: it is unknown"] if own.options else []
    differences = _list_differences(theirs.options, own.options)
    return [f"other than they were trained with: {name} = {now} instead of {before}" for name, before, now in differences]


def _list_differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Names, with both values, of what both describe and what differs."""
    return [(name, _show(before[name]), _show(value)) for name, value in now.items() if name in before and before[name] != value]


def _show(value: Any) -> str:
    return value if isinstance(value, str) and " " in value else json.dumps(value)


def _group(tensors: Mapping[str, Tensor | str], prefixes: tuple[str, ...]) -> dict[str, dict[str, Tensor | str]]:
    """Tensors of the exported modules, by module and name."""
    modules: dict[str, dict[str, Tensor | str]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if name.startswith(prefixes):
            modules[name.partition(".")[0]][name] = tensor
    return modules


def _find_fault(live: Mapping[str, Tensor | str], stored: Iterable[str], source: WeightSource) -> str | None:
    """Why a module cannot be taken."""
    names = set(stored)
    if missing := [name for name in live if name not in names]:
        return f"they lack {_list_first(missing)}"
    if unknown := sorted(names - live.keys()):
        return f"this run's has no {_list_first(unknown)}"
    for name, tensor in live.items():
        shape, dtype, _ = source.entries[name]
        assert isinstance(tensor, Tensor)
        if shape != tuple(tensor.shape):
            return f"{name} is {list(shape)} instead of {list(tensor.shape)}"
        if dtype not in DTYPES.values():
            return f"{name} is {dtype}, which is no plain float"
    return None


def _list_first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
