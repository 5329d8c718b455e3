"""What a rank that fails tells the launcher, and by which exit code it ends."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from flame.config.schema import JobConfig
from flame.errors import MachineFault, UserError
from flame.runtime.agreement import RankFailure
from flame.runtime.disk import explain
from flame.runtime.distributed import get_world_size
from flame.runtime.endings import LOST_EXIT_CODE, PeerFailure, find_peer_failure
from flame.trainer.saved import describe_saved


class Failure(NamedTuple):
    """The end of a rank that is no fault of the program."""

    told: Exception
    exit_code: int


def explain_failure(error: Exception, config: JobConfig | None) -> Failure | None:
    """The mistake, the lost rank or the machine's fault behind an error; None for a fault of the program.

    Args:
        config: None while the options are not read.
    """
    told = _find_line(error, config)
    is_mistake = told is not None and not isinstance(told, MachineFault)
    if not is_mistake and get_world_size() > 1 and (lost := find_peer_failure(error)):
        return Failure(PeerFailure(lost), LOST_EXIT_CODE)
    return None if told is None else Failure(told, told.EXIT_CODE)


def _find_line(error: Exception, config: JobConfig | None) -> UserError | None:
    if isinstance(error, UserError) or config is None:
        return error if isinstance(error, UserError) else None
    if isinstance(error, RankFailure) and error.is_of_machine:
        return MachineFault(f"{error}: {describe_saved(config)}")
    return explain(error, Path(config.job.dump_folder)) if isinstance(error, OSError) else None
