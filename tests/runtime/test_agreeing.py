"""What each machine of a run says at its end, when they have told each other how they ended."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from flame.runtime import machines as module
from flame.runtime.endings import LOST_EXIT_CODE, Ending, Kind
from flame.runtime.launching import Launching
from flame.runtime.machines import Machines
from flame.runtime.rendezvous import Place
from tests.support.machines import TIMEOUT, place

KILLED = Ending(Kind.CAUSE, 137, ["rank 1 was ended by SIGKILL"])
ABORTED = Ending(Kind.SUSPECT, 134, ["rank 1 was ended by SIGABRT"])
LOST = Ending(Kind.CONSEQUENCE, LOST_EXIT_CODE, ["rank 0 has lost another rank"])
STOPPED = Ending(Kind.STOPPED, 75, [])
HOST = socket.gethostname()


class Ended:
    """Launchers of machines whose workers end at given seconds. None: the machine is gone without a word."""

    def __init__(self, threads: ThreadPoolExecutor, places: list[Place], act: Callable[[Ending], None] = lambda _: None):
        self._threads, self._act = threads, act
        machines = [Machines(each, TIMEOUT) for each in places]
        waiting = [threads.submit(each.meet) for each in machines]
        for each in waiting:
            each.result(TIMEOUT)
        self._launchers = [self._launch(each) for each in machines]

    def _launch(self, machines: Machines) -> Launching:
        launcher = Launching(["--nproc_per_node=1", "-m", "x"], machines.place, int(TIMEOUT), set(), lambda: "")
        launcher._machines, launcher._watch = machines, machines.watch(self._act)
        return launcher

    def agree(self, *ends: tuple[float, Ending] | None) -> list[tuple[int, list[str], float]]:
        """Exit code, lines and seconds from its own end of each machine that is not gone."""

        def end(launcher: Launching, seconds: float, ending: Ending) -> tuple[int, list[str], float]:
            time.sleep(seconds)
            began = time.monotonic()
            found = launcher._agree(ending)
            assert launcher._watch is not None
            launcher._watch.close()
            return found.exit_code, found.lines, time.monotonic() - began

        waiting: list[Future] = []
        with ExitStack() as ending:
            for launcher, each in zip(self._launchers, ends, strict=True):
                if each is None:
                    assert launcher._watch is not None
                    ending.callback(launcher._watch.close)
                else:
                    waiting.append(self._threads.submit(end, launcher, *each))
            return [each.result(2 * module.FAREWELL_SECONDS + TIMEOUT) for each in waiting]


@pytest.mark.parametrize(("late", "first"), [(True, KILLED), (False, KILLED), (True, STOPPED)])
def test_machine_0_waits_for_no_machine_that_has_left(threads: ThreadPoolExecutor, port: int, late: bool, first: Ending) -> None:
    """One that knows the cause leaves at once."""
    ended = Ended(threads, [place(0, port), place(1, port)])
    other = LOST if first.kind == Kind.CAUSE else STOPPED
    zero, one = ended.agree((1.0 * late, other), (0.0, first))
    assert zero[:2] == (other.exit_code, first.lines) and one[:2] == (first.exit_code, first.lines)
    assert zero[2] < 5 and one[2] < 5


def test_the_cause_is_told_before_its_machine_leaves(threads: ThreadPoolExecutor, port: int) -> None:
    """Also while it waits for its own workers, since another has ended."""
    ended = Ended(threads, [place(0, port), place(1, port)], act=lambda _: time.sleep(6))
    zero, one = ended.agree((0.0, ABORTED), (1.5, KILLED))
    assert zero[:2] == (LOST_EXIT_CODE, KILLED.lines) and one[:2] == (137, KILLED.lines)


def test_where_others_go_on_an_aborted_rank_is_the_cause(threads: ThreadPoolExecutor, port: int) -> None:
    ended = Ended(threads, [place(0, port, 1, 2), place(1, port, 1, 2)])
    (one,) = ended.agree(None, (0.0, ABORTED))
    assert one[:2] == (134, ABORTED.lines) and one[2] < 5


def test_a_machine_without_a_word_comes_before_an_aborted_rank(
    threads: ThreadPoolExecutor, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FAREWELL_SECONDS", 3.0)
    ended = Ended(threads, [place(number, port, 3, 3) for number in range(3)])
    zero, one = ended.agree((0.5, LOST), (0.0, ABORTED), None)
    gone = f"machine 2 ({HOST}) has ended without a word, or cannot be reached: "
    assert zero[:2] == (LOST_EXIT_CODE, [gone + LOST.lines[0]]) and one[:2] == (LOST_EXIT_CODE, [gone + ABORTED.lines[0]])
