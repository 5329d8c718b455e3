"""Every objective, at a size for tests, and files with objectives of a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flame.config.run import ObjectiveChoice
from flame.config.schema import JobConfig
from flame.config.types import Section
from flame.models.wrapper import TrainingModel
from flame.objectives.registry import BUILT_IN, load_user_objective
from tests.support.models import build_unsharded, configure
from tests.support.paths import REPO

SKIP_TOKEN = REPO / "docs" / "examples" / "skip_token.py"
OPTIONS: dict[str, dict[str, Any]] = {
    "future": {"learnable_temperature": True},
    "mtp": {"tokens": 3},
    "mtp_sequential": {"tokens": 3},
    "top": {"window": 5},
    "fsp_bow": {"window": 5},
    "fsp_revlm": {},
    "nitp": {},
    "nextlat": {"horizon": 2},
    "regret": {},
    "stp": {},
    "skip_token": {"distance": 2},
}
"""Options of each built-in objective and of the documented example."""


def choose(name: str, *further: Section, **changes: Any) -> JobConfig:
    """A configuration with one of `OPTIONS`, changed."""
    if name in BUILT_IN:
        kind, choice = BUILT_IN[name], ObjectiveChoice(name=name)
    else:
        assert name == "skip_token"
        return choose_file(SKIP_TOKEN, *further, **OPTIONS[name] | changes)
    return configure(kind.options(**OPTIONS[name] | changes), *further, objective=choice)


def choose_file(path: Path, *further: Section, **options: Any) -> JobConfig:
    """A configuration with the objective of a file."""
    kind = load_user_objective(None, str(path))
    assert kind is not None
    return configure(kind.options(**options), *further, objective=ObjectiveChoice(path=str(path)))


def build_objective(name: str, *further: Section, **changes: Any) -> TrainingModel:
    """A small model with one of `OPTIONS`, changed."""
    return build_unsharded(choose(name, *further, **changes))
