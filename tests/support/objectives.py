"""Every objective, at a size for tests, and files with objectives of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def expect_definition(model: TrainingModel, compute: Callable[[], Tensor], by_loop: Callable[[], Tensor]) -> None:
    """Value and gradient of a loss in float64 are those of a plain loop."""
    found = []
    for run in (compute, by_loop):
        model.zero_grad()
        loss = run()
        loss.backward()
        zeros = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
        found.append((loss.detach(), torch.cat([gradient.flatten() for gradient in zeros])))
    (loss, gradient), (expected, expected_gradient) = found
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-9)
