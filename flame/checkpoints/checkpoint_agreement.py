"""Steps in which all ranks succeed or fail together: no rank goes on, or waits, where another has stopped."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from flame.errors import UserError

T = TypeVar("T")

DAMAGE, FAULT, MISTAKE = range(3)


class RankFailure(Exception):
    """What went wrong on one rank, in one line, raised on every rank.

    Args:
        is_damage: a file is not what it should be, as far as can be told; otherwise the machine is at fault.
    """

    def __init__(self, line: str, is_damage: bool = False):
        super().__init__(line)
        self.is_damage = is_damage


def run_on_all(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Let each rank of a group do something; all ranks call it.

    Args:
        group: the default one if None.

    Returns:
        this rank's result.

    Raises:
        UserError: some rank met one; it is raised on all.
        RankFailure: some rank met another error.
        KeyboardInterrupt: as the action does, also where torch's checkpointing has made a failure of it.
    """
    result: T | None = None
    error: BaseException | None = None
    try:
        result = action()
    except (Exception, CheckpointException) as caught:
        if _is_interrupt(caught):
            raise KeyboardInterrupt from caught
        error = caught
    outcomes: list[tuple[int, str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, None if error is None else (_weigh(error), describe(error)), group=group)
    failures = [outcome for outcome in outcomes if outcome is not None]
    if failures:
        weight, line = max(failures, key=lambda failure: failure[0])  # the user's mistake, if there is one, explains the rest
        raise UserError(*line.splitlines()) if weight == MISTAKE else RankFailure(line, weight == DAMAGE) from error
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


def _is_interrupt(error: BaseException) -> bool:
    """Torch's checkpointing collects whatever stops a rank, Ctrl-C too, and raises it as a failure on every rank."""
    return isinstance(error, CheckpointException) and any(
        isinstance(met, KeyboardInterrupt) for met, _ in error.failures.values()
    )


def _weigh(error: BaseException) -> int:
    """Tell damage to a file from a machine that has run out of memory, handles or connections, and both from a mistake."""
    if isinstance(error, UserError):
        return MISTAKE
    if isinstance(error, RankFailure):
        return DAMAGE if error.is_damage else FAULT
    if isinstance(error, CheckpointException) and error.failures:
        return max(_weigh(failure) for failure, _ in error.failures.values())
    if isinstance(error, OSError):
        return DAMAGE if error.errno in (None, errno.ENOENT, errno.ENOTDIR, errno.EIO) else FAULT
    is_out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return FAULT if is_out_of_memory or not isinstance(error, (ValueError, LookupError, RuntimeError)) else DAMAGE


def describe(error: BaseException) -> str:
    """An error in one line; a UserError in its own lines."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, CheckpointException) and error.failures:
        return describe(next(iter(error.failures.values()))[0])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
