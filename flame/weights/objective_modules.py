"""Which modules of an objective are taken from initial weights: those that fit, module by module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from flame.objectives.base import Objective
from flame.weights.plan import Reading, read_plainly
from flame.weights.source import DTYPES, WeightSource, find_objective_weights

SHOWN = 3


class ModulePlan(NamedTuple):
    """How the modules that are taken are read."""

    readings: dict[str, Reading]
    """By name within the objective."""
    taken: set[str]
    """Names of the modules."""
    lines: list[str]
    """For the log."""


def plan_modules(objective: Objective, source: WeightSource) -> ModulePlan:
    """Plan which of the modules that the objective exports are read from where the language model's weights are.

    A module is taken if the names and shapes of its tensors are the same.

    Raises:
        UserError: the file that holds them cannot be read.
    """
    found = find_objective_weights(source, objective.name)
    if found is None:
        return ModulePlan({}, set(), [])
    prefixes = tuple(objective.list_exported())
    live = _group(objective.state_dict(), prefixes)
    stored = _group({name: name for name in found.entries}, prefixes)
    plan = ModulePlan({}, set(), [])
    for module in sorted(live.keys() | stored.keys()):
        fault = _find_fault(live[module], stored[module], found)
        if fault:
            plan.lines.append(f"{module} of {source.label} does not fit and is not taken: {fault}")
        else:
            plan.readings.update({name: read_plainly(found, name) for name in live[module]})
            plan.taken.add(module)
            plan.lines.append(f"{module} from {source.label}: {len(live[module])} tensors")
    return plan


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
