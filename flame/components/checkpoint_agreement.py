"""Steps in which all ranks succeed or fail together: no rank goes on, or waits, where another has stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from flame.errors import UserError

T = TypeVar("T")


class RankFailure(Exception):
    """What went wrong on one rank, in one line, raised on every rank."""


def run_on_all(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Let each rank of a group do something; all ranks call it.

    Args:
        group: the default one if None.

    Returns:
        this rank's result.

    Raises:
        UserError: some rank met one; it is raised on all.
        RankFailure: some rank met another error.
    """
    result: T | None = None
    error: BaseException | None = None
    try:
        result = action()
    except (Exception, CheckpointException) as caught:
        error = caught
    outcomes: list[tuple[bool, str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, None if error is None else (isinstance(error, UserError), describe(error)), group=group)
    failures = [outcome for outcome in outcomes if outcome is not None]
    if failures:
        is_mistake, line = max(failures, key=lambda failure: failure[0])  # the user's mistake, if there is one, explains the rest
        raise UserError(*line.splitlines()) if is_mistake else RankFailure(line) from error
    return result  # type: ignore[return-value]


def run_on_main(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Let rank 0 do something and tell all ranks the outcome; all ranks call it.

    Args:
        group: the default one if None.

    Returns:
        rank 0's result, which must be picklable.

    Raises:
        UserError, RankFailure: as `run_on_all`.
    """
    result = run_on_all(action if dist.get_rank() == 0 else lambda: None, group)
    box = [result]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]  # type: ignore[return-value]


def describe(error: BaseException) -> str:
    """An error in one line; a UserError in its own lines."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, CheckpointException) and error.failures:
        return describe(next(iter(error.failures.values()))[0])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
