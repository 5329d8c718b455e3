"""The objectives by name: built-in, from a file, or from an installed package. Loads no torch until one is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from flame.config.run import NEXT_TOKEN
from flame.config.table import find_section_fault
from flame.config.types import Section
from flame.errors import UserError
from flame.objectives.fsp_bow.options import BagOfWordsOptions
from flame.objectives.fsp_revlm.options import ReverseSummaryOptions
from flame.objectives.future.options import FutureOptions
from flame.objectives.mtp.options import MultiTokenOptions
from flame.objectives.mtp_sequential.options import SequentialTokenOptions
from flame.objectives.nextlat.options import NextLatentOptions
from flame.objectives.nitp.options import ImplicitTokenOptions
from flame.objectives.options import ObjectiveOptions
from flame.objectives.regret.options import RegretOptions
from flame.objectives.stp.options import SemanticTubeOptions
from flame.objectives.top.options import TokenOrderOptions
from flame.runtime.user_code import find_user_class

if TYPE_CHECKING:
    from flame.config.schema import JobConfig
    from flame.objectives.base import Objective

ENTRY_POINTS = "flame.objectives"
"""Entry-point group in which an installed package registers its objectives."""


class ObjectiveKind(NamedTuple):
    """An objective that can be trained."""

    name: str
    options: type[ObjectiveOptions]
    load: Callable[[], type[Objective]]
    """Imports its code."""

    @property
    def sections(self) -> dict[str, type[Section]]:
        """The sections that it reads, by name."""
        return {kind.section: kind for kind in (self.options, *self.options.companions)}


def _build_in(name: str, options: type[ObjectiveOptions], class_name: str) -> ObjectiveKind:
    def load() -> type[Objective]:
        return getattr(import_module(f"flame.objectives.{name}.objective"), class_name)

    return ObjectiveKind(name, options, load)


BUILT_IN = {
    kind.name: kind
    for kind in (
        _build_in("future", FutureOptions, "FutureObjective"),
        _build_in("mtp", MultiTokenOptions, "MultiTokenPrediction"),
        _build_in("mtp_sequential", SequentialTokenOptions, "SequentialModules"),
        _build_in("top", TokenOrderOptions, "TokenOrderPrediction"),
        _build_in("fsp_bow", BagOfWordsOptions, "BagOfWords"),
        _build_in("fsp_revlm", ReverseSummaryOptions, "ReverseSummary"),
        _build_in("nitp", ImplicitTokenOptions, "ImplicitTokenPrediction"),
        _build_in("nextlat", NextLatentOptions, "NextLatentPrediction"),
        _build_in("regret", RegretOptions, "Regret"),
        _build_in("stp", SemanticTubeOptions, "SemanticTube"),
    )
}


def load_user_objective(name: str | None, path: str) -> ObjectiveKind | None:
    """Load the objective in the file `path`, or else the one that an installed package registers under `name`.

    Returns:
        None if `path` is empty and no package registers `name`.

    Raises:
        UserError: it cannot be loaded, or its name is missing or taken.
    """
    if path:
        label = f'objective.path = "{path}"'
        from flame.objectives.base import Objective

        return _describe_class(find_user_class(path, label, Objective, "an objective"), label)
    if name is None or name in (*BUILT_IN, NEXT_TOKEN):
        return None
    found = [point for point in entry_points(group=ENTRY_POINTS) if point.name == name]
    if not found:
        return None
    label = f'objective.name = "{name}" (entry point {found[0].value})'
    try:
        loaded: Any = found[0].load()
    except Exception as error:  # a user's code may raise anything
        raise UserError(f"{label} cannot be imported: {type(error).__name__}: {error}") from error
    from flame.objectives.base import Objective

    if not (isinstance(loaded, type) and issubclass(loaded, Objective)) or loaded.name != name:
        raise UserError(f'{label} must be a class derived from flame.objectives.base.Objective whose name is "{name}"')
    return _describe_class(loaded, label)


def _describe_class(kind: type[Objective], label: str) -> ObjectiveKind:
    from flame.objectives.base import Objective

    name, options = kind.name, kind.Options
    if not (isinstance(name, str) and name.isidentifier()) or name in (*BUILT_IN, NEXT_TOKEN):
        raise UserError(
            f'{label}: {kind.__name__}.name = "{kind.name}": it must be a Python identifier that no other objective has'
        )
    fault = find_section_fault(options, ObjectiveOptions)
    if fault is None:
        faults = (find_section_fault(each, Section) for each in options.companions)
        fault = next((f"has a companion that {each}" for each in faults if each), None)
    if fault:
        raise UserError(f"{label}: {kind.__name__}.Options {fault}")
    if kind.loss is Objective.loss:
        raise UserError(f"{label}: {kind.__name__} does not define loss()")
    if not options.section:
        text = options.__doc__ or f"Options of {name}."
        kind.Options = options = type(options.__name__, (options,), {"section": name, "__doc__": text})
    return ObjectiveKind(name, options, lambda: kind)


def choose_objective(job: JobConfig) -> ObjectiveKind | None:
    """The objective of a run; None for next-token prediction alone, which includes a `loss_weight` of 0.

    Raises:
        UserError: as `choose_kind`.
    """
    kind = choose_kind(job)
    return kind if kind is not None and job.get(kind.options).loss_weight > 0 else None


def choose_kind(job: JobConfig) -> ObjectiveKind | None:
    """The objective that the options name, whatever its `loss_weight`; None for next-token prediction.

    Raises:
        UserError: `objective.name` is unknown, or the user's objective cannot be loaded.
    """
    user = load_user_objective(job.objective.name, job.objective.path)
    known: Mapping[str, ObjectiveKind] = BUILT_IN | ({user.name: user} if user else {})
    name = job.objective.name or (user.name if user else NEXT_TOKEN)
    if name == NEXT_TOKEN:
        return None
    if name not in known:
        names = " or ".join(f'"{each}"' for each in (NEXT_TOKEN, *known))
        raise UserError(f'objective.name = "{name}": allowed is {names}; objective.path names a file with one of your own')
    return known[name]
