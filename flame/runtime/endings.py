"""How the workers of a machine have ended: why, in a line, and by which exit code.

When one rank ends, the others wait for it in a collective and fail too. So each ending is a cause or a consequence of another's.
A run says its cause alone.
"""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

LOST_EXIT_CODE = 69
"""EX_UNAVAILABLE of sysexits.h: another rank or machine has ended or is silent, so this one cannot go on."""

PEER_MESSAGES = re.compile(
    r"gloo/|\bgloo\b.*(timed? ?out|closed)|NCCL|ncclRemoteError|Connection (closed|reset) by peer|Broken pipe|TCPStore|"
    r"failed to connect|wait timeout after|Timed out waiting",
    re.IGNORECASE,
)
"""What torch says where it only raises a RuntimeError."""
TIMEOUT_MESSAGES = re.compile(r"tim(ed? ?out)", re.IGNORECASE)


LONGEST_REASON = 160
"""Characters of torch's own words."""
ABORTS = (signal.SIGABRT, signal.SIGSEGV)
"""How torch ends a rank, or a rank ends while torch takes a broken process group down."""
HINTS: dict[int, str] = {
    signal.SIGKILL: " (often the kernel, when memory runs out: see dmesg)",
    **dict.fromkeys(ABORTS, " (often torch, when a GPU fails or NCCL loses another rank: see the lines above)"),
}
"""By the signal that has ended a rank."""


class PeerFailure(Exception):
    """This rank waited in vain for another, or has lost its connection to it. One line."""


class Kind(StrEnum):
    """What an ending is to the run."""

    MISTAKE = "mistake"
    STOPPED = "stopped"
    CAUSE = "cause"
    SUSPECT = "suspect"
    """A rank was aborted: by a fault of its own, or by torch, because NCCL has lost another rank."""
    CONSEQUENCE = "consequence"


@dataclass
class Ending:
    """How the workers of one machine have ended.

    Args:
        lines: what to print, without line ends. Lines that are no mistake name rank and host.
        is_timeout: a consequence: the workers have waited until a timeout, so that another rank is silent and not gone.
        trace: a traceback that no worker has shown.
    """

    kind: Kind
    exit_code: int
    lines: list[str]
    machine: int = 0
    host: str = field(default_factory=socket.gethostname)
    is_timeout: bool = False
    trace: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"trace": ""})

    @classmethod
    def from_json(cls, text: str) -> Ending:
        values = json.loads(text)
        return cls(**values | {"kind": Kind(values["kind"])})


@dataclass(frozen=True)
class WorkerEnd:
    """How one worker has ended.

    Args:
        exit_code: as of `subprocess`: -n for signal n.
        message: what it passed on, such as "ValueError: wrong"; empty if it could not.
        trace: its traceback, if it passed one on.
        is_shown: whether its output is shown.
    """

    rank: int
    exit_code: int
    message: str = ""
    trace: str = ""
    is_shown: bool = True

    @property
    def is_consequence(self) -> bool:
        return self.exit_code == LOST_EXIT_CODE

    @property
    def is_aborted(self) -> bool:
        return -self.exit_code in ABORTS

    def describe(self, host: str) -> str:
        """In one line."""
        who = f"rank {self.rank} on {host}"
        if self.is_consequence:
            return f"{who} {self.message.removeprefix('PeerFailure: ') or 'has lost another rank'}"
        if self.exit_code < 0:
            return f"{who} was ended by {_name_signal(-self.exit_code)}{HINTS.get(-self.exit_code, '')}"
        if self.message:
            where = " (traceback above)" if self.trace or self.is_shown else ""
            return f"{who} failed: {' '.join(self.message.split())[:300]}{where}"
        return f"{who} ended with exit code {self.exit_code}"


def find_ending(workers: list[WorkerEnd], silent: dict[int, str], host: str) -> Ending:
    """The ending of a machine whose workers have failed.

    Args:
        workers: those that ended by themselves, first to last.
        silent: ranks that did not end though others waited for them in vain, with what they do.
    """
    causes = [worker for worker in workers if not worker.is_consequence]
    certain = [worker for worker in causes if not worker.is_aborted]
    if silent and not certain:
        names = [f"rank {rank} on {host} is silent ({state})" for rank, state in sorted(silent.items())]
        return Ending(Kind.CAUSE, LOST_EXIT_CODE, [", ".join(names)], host=host)
    if not causes:
        first = workers[0]
        is_timeout = bool(TIMEOUT_MESSAGES.search(first.message) or "waited" in first.message)
        return Ending(Kind.CONSEQUENCE, LOST_EXIT_CODE, [first.describe(host)], host=host, is_timeout=is_timeout)
    first = (certain or causes)[0]
    kind = Kind.CAUSE if certain else Kind.SUSPECT
    code = first.exit_code if first.exit_code > 0 else 128 - first.exit_code
    return Ending(kind, code, [first.describe(host)], host=host, trace="" if first.is_shown else first.trace)


def find_peer_failure(error: BaseException) -> str | None:
    """What an error says of another rank, in a few words; None if it is this rank's own."""
    messages = [str(each) for each in _list_errors(error) if _blames_peer(each)]
    if not messages:
        return None
    if any(TIMEOUT_MESSAGES.search(message) for message in messages):
        return "waited for another rank until comm.timeout_seconds"
    return f"has lost its connection to another rank ({' '.join(messages[0].split())[:LONGEST_REASON]})"


def _blames_peer(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(PEER_MESSAGES.search(str(error))))


def _list_errors(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what has led to it, and what ranks have reported."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [each.__cause__, each.__context__]
        if isinstance(each, CheckpointException):
            waiting += [failure for failure, _ in each.failures.values()]


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
