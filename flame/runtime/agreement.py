"""Runs actions that succeed or fail on all ranks together, so that no rank continues or waits after another has failed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from flame.errors import MachineFault, UserError

T = TypeVar("T")

DAMAGE, FAULT, MACHINE, MISTAKE = range(4)


class RankFailure(Exception):
    """An error of one rank, in one line, raised on every rank.

    Args:
        is_damage: the error looks like a damaged or missing file.
        is_of_machine: disk or memory failed, and not the program.
    """

    def __init__(self, line: str, is_damage: bool = False, is_of_machine: bool = False):
        super().__init__(line)
        self.is_damage, self.is_of_machine = is_damage, is_of_machine


def run_on_all(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run an action on each rank of a group. A collective call.

    Args:
        group: None for the default group.

    Returns:
        this rank's result.

    Raises:
        UserError, MachineFault: a rank raised one; all ranks raise it.
        RankFailure: a rank raised another error.
        KeyboardInterrupt: the action raised it, or torch's checkpointing reported one as a failure.
    """
    result: T | None = None
    error: BaseException | None = None
    try:
        result = action()
    except (Exception, CheckpointException) as caught:
        if _is_interrupt(caught):
            raise KeyboardInterrupt from caught
        error = caught
    outcomes: list[tuple[int, str, bool] | None] = [None] * dist.get_world_size(group)
    own = None if error is None else (_classify(error), describe(error), _is_of_machine(error))
    dist.all_gather_object(outcomes, own, group=group)
    failures = [outcome for outcome in outcomes if outcome is not None]
    if failures:
        kind, line, is_of_machine = max(failures, key=lambda failure: failure[0])  # a user's mistake explains the rest
        if kind in (MACHINE, MISTAKE):
            raise (UserError if kind == MISTAKE else MachineFault)(*line.splitlines()) from error
        raise RankFailure(line, kind == DAMAGE, is_of_machine) from error
    return result  # type: ignore[return-value]


def run_on_main(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run an action on rank 0 and return its result on all ranks. A collective call.

    Args:
        group: None for the default group.

    Returns:
        rank 0's result, which must be picklable.

    Raises:
        UserError, RankFailure: as in `run_on_all`.
    """
    result = run_on_all(action if dist.get_rank() == 0 else lambda: None, group)
    box = [result]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]  # type: ignore[return-value]


def _is_interrupt(error: BaseException) -> bool:
    """Whether an error of torch's checkpointing comes from Ctrl-C. It reports that as a failure on every rank."""
    return isinstance(error, CheckpointException) and any(
        isinstance(met, KeyboardInterrupt) for met, _ in error.failures.values()
    )


def _classify(error: BaseException) -> int:
    """MISTAKE for an error of the user, MACHINE for a told fault of the machine, DAMAGE for a damaged file, FAULT for others."""
    if isinstance(error, UserError):
        return MACHINE if isinstance(error, MachineFault) else MISTAKE
    if isinstance(error, RankFailure):
        return DAMAGE if error.is_damage else FAULT
    if isinstance(error, CheckpointException) and error.failures:
        return max(_classify(failure) for failure, _ in error.failures.values())
    if isinstance(error, OSError):
        return DAMAGE if error.errno in (None, errno.ENOENT, errno.ENOTDIR, errno.EIO) else FAULT
    is_out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return FAULT if is_out_of_memory or not isinstance(error, (ValueError, LookupError, RuntimeError)) else DAMAGE


def _is_of_machine(error: BaseException) -> bool:
    if isinstance(error, CheckpointException) and error.failures:
        return all(_is_of_machine(failure) for failure, _ in error.failures.values())
    if isinstance(error, RankFailure):
        return error.is_of_machine
    return isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError))


def describe(error: BaseException) -> str:
    """An error in one line. A UserError keeps its own lines."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, CheckpointException) and error.failures:
        return describe(next(iter(error.failures.values()))[0])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
