"""Machines that meet before a run, and tell each other how they end. Here each is a thread."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from flame.errors import UserError
from flame.runtime import machines as module
from flame.runtime.endings import LOST_EXIT_CODE, Ending, Kind
from flame.runtime.machines import Machines, MachinesLost, Watch, tell_mistake
from flame.runtime.network import GLOO_INTERFACE
from flame.runtime.rendezvous import Place, read_place, set_rendezvous
from tests.support.machines import TIMEOUT, place


def meet(where: Place, timeout: float = TIMEOUT) -> Machines:
    machines = Machines(where, timeout)
    machines.meet()
    return machines


def read_lines(future: Future[Any]) -> list[str]:
    """Of the ending that a machine met instead of the others."""
    with pytest.raises(MachinesLost) as caught:
        future.result(TIMEOUT)
    return caught.value.ending.lines


def test_machines_meet_in_any_order(threads: ThreadPoolExecutor, port: int) -> None:
    late = [threads.submit(meet, place(number, port, 3, 3)) for number in (2, 1)]
    time.sleep(0.1)
    first = meet(place(0, port, 3, 3))
    hosts = dict.fromkeys(range(3), socket.gethostname())
    assert first.hosts == hosts and all(each.result(TIMEOUT).hosts == hosts for each in late)
    assert os.environ[GLOO_INTERFACE] == "lo"


def test_who_waits_says_for_whom(
    threads: ThreadPoolExecutor, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "FIRST_WORD_SECONDS", 0.0)
    with pytest.raises(MachinesLost) as alone:
        meet(place(1, port), timeout=0.6)
    assert alone.value.ending.exit_code == LOST_EXIT_CODE
    assert alone.value.ending.lines == [
        f"machine 0 has not come to 127.0.0.1:{port} within comm.timeout_seconds = 0.6: start the same command there"
    ]
    with pytest.raises(MachinesLost) as alone:
        meet(place(0, port, 3, 3), timeout=0.6)
    absent = f"2 of 3 machines (NODE_RANK 1, 2) did not come to 127.0.0.1:{port}"
    assert alone.value.ending.lines == [f"{absent} within comm.timeout_seconds = 0.6: start the same command there"]
    assert capsys.readouterr().err.splitlines() == [
        f"waiting for machine 0 at 127.0.0.1:{port}, for at most 0.6 s",
        f"waiting for 2 of 3 machines (NODE_RANK 1, 2) to come to 127.0.0.1:{port}, for at most 0.6 s",
    ]


def test_two_machines_with_one_number_are_refused(threads: ThreadPoolExecutor, port: int) -> None:
    first = threads.submit(meet, place(0, port, 3, 3), 3.0)
    second = threads.submit(meet, place(1, port, 3, 3), 3.0)
    time.sleep(1.0)
    machines = Machines(place(1, port, 3, 3), TIMEOUT)
    machines._open(time.monotonic() + TIMEOUT)
    machines._store.set("flame/here/1", '{"host": "b", "process": 7, "reached": "127.0.0.1"}')
    with pytest.raises(UserError, match=r"^NODE_RANK = 1 \(environment\) is that of process 7 on b too: give each"):
        machines.meet()
    assert len(read_lines(first)) == len(read_lines(second)) == 1


def test_a_machine_that_was_started_again_before_the_run_began_takes_its_place(threads: ThreadPoolExecutor, port: int) -> None:
    first = threads.submit(meet, place(0, port, 3, 3))
    gone = subprocess.Popen(["true"])
    gone.wait()
    again = Machines(place(1, port, 3, 3), TIMEOUT)
    again._open(time.monotonic() + TIMEOUT)
    earlier = {"host": socket.gethostname(), "process": gone.pid, "reached": "127.0.0.1"}
    again._store.set("flame/here/1", json.dumps(earlier))
    second, third = threads.submit(again.meet), threads.submit(meet, place(2, port, 3, 3))
    assert first.result(TIMEOUT).hosts.keys() == {0, 1, 2}
    second.result(TIMEOUT)
    third.result(TIMEOUT)


def test_a_port_in_use_is_one_line(port: int) -> None:
    with (
        socket.create_server(("", port)),
        pytest.raises(UserError, match=rf"^MASTER_PORT = {port} .* cannot be opened"),
    ):
        meet(place(0, port))


def test_the_mistake_of_one_machine_ends_the_others(threads: ThreadPoolExecutor, port: int) -> None:
    waiting = threads.submit(meet, place(0, port))
    tell_mistake(place(1, port), UserError("optimizer.lr = 0: wrong"))
    assert read_lines(waiting) == [f"machine 1 ({socket.gethostname()}): optimizer.lr = 0: wrong"]


def test_a_mistake_beside_a_run_that_has_begun_does_not_end_it(threads: ThreadPoolExecutor, port: int) -> None:
    other = threads.submit(meet, place(1, port))
    first = meet(place(0, port))
    other.result(TIMEOUT)
    first._store.set("flame/begun", "1")
    tell_mistake(place(1, port), UserError("optimizer.lr = 0: wrong"))
    assert not first._read_endings()


def test_machine_0_tells_its_mistake_before_it_leaves(threads: ThreadPoolExecutor, port: int) -> None:
    waiting = threads.submit(meet, place(1, port))
    tell_mistake(place(0, port), UserError("optimizer.lr = 0: wrong"))
    assert read_lines(waiting) == [f"machine 0 ({socket.gethostname()}): optimizer.lr = 0: wrong"]


LOST = Ending(Kind.CONSEQUENCE, LOST_EXIT_CODE, ["waited"])
ABORTED = Ending(Kind.SUSPECT, 134, ["aborted"])


def watch_two(threads: ThreadPoolExecutor, port: int, act: Callable[[Ending], None]) -> tuple[Machines, Watch, Machines, Watch]:
    later = threads.submit(meet, place(1, port))
    first = meet(place(0, port))
    second = later.result(TIMEOUT)
    return first, first.watch(act), second, second.watch(act)


def test_endings_reach_the_others(threads: ThreadPoolExecutor, port: int) -> None:
    seen: list[Ending] = []
    arrived = threading.Event()
    _, first, _, second = watch_two(threads, port, lambda ending: (seen.append(ending), arrived.set())[0])
    assert first.missing == [1] and second.missing == [0]
    second.tell(Ending(Kind.CONSEQUENCE, LOST_EXIT_CODE, ["waited"]))
    assert arrived.wait(TIMEOUT)
    first.wait_for(lambda watch: not watch.missing)
    assert [(each.machine, each.kind, each.lines) for each in seen] == [(1, Kind.CONSEQUENCE, ["waited"])]
    assert not first.list_causes(LOST) and second.missing == [0]
    first.tell(Ending(Kind.CAUSE, 137, ["killed"]))
    second.wait_for(lambda watch: not watch.missing)
    assert [each.lines for each in second.list_causes(LOST)] == [["killed"]]
    assert first.close() and second.close()


def test_an_aborted_rank_is_the_cause_only_if_there_is_no_other(threads: ThreadPoolExecutor, port: int) -> None:
    """On a GPU, torch aborts a rank that has lost another one."""
    _, first, _, second = watch_two(threads, port, lambda _: None)
    second.tell(ABORTED)
    first.wait_for(lambda watch: not watch.missing)
    assert [each.lines for each in first.list_causes(LOST)] == [["aborted"]]
    assert not first.list_causes(ABORTED)
    assert not first.list_causes(Ending(Kind.CAUSE, 137, ["killed"]))
    first.tell(Ending(Kind.CAUSE, 137, ["killed"]))
    second.wait_for(lambda watch: not watch.missing)
    assert [each.lines for each in second.list_causes(ABORTED)] == [["killed"]]
    assert first.close() and second.close()


def test_a_machine_knows_when_the_others_have_heard(threads: ThreadPoolExecutor, port: int) -> None:
    """Machine 0 stays until then, for the store goes with it."""
    first_machine, first, second_machine, second = watch_two(threads, port, lambda _: None)
    second.tell(LOST)
    first.wait_for(lambda watch: not watch.missing)
    assert not first.is_heard and not second_machine._store.check(["flame/read/0/1"])
    first.tell(Ending(Kind.CAUSE, 137, ["killed"]))
    first.wait_for(lambda watch: watch.is_heard)
    assert first_machine.have_read([1])
    assert first.close()
    second.wait_for(lambda watch: not watch.missing)
    assert [each.lines for each in second.list_causes(LOST)] == [["killed"]]
    assert second.close()


def test_a_machine_that_comes_back_may_end_again(threads: ThreadPoolExecutor, port: int) -> None:
    seen: list[list[str]] = []
    _, first, again, second = watch_two(threads, port, lambda ending: seen.append(ending.lines))
    for text in ("killed", "killed", "out of memory"):
        second.tell(Ending(Kind.CAUSE, 137, [text]))
        first.wait_for(lambda watch: not watch.missing)
        assert first.list_causes(LOST)[0].lines == [text]
        again._store.delete_key(f"{module.ENDING}/1")  # as `meet` does
        first.wait_for(lambda watch: watch.missing == [1])
        assert first.missing == [1] and not first.list_causes(LOST)
    assert seen == [["killed"], ["killed"], ["out of memory"]]
    assert first.close() and second.close()


def test_a_start_does_not_take_an_earlier_ones_ending_for_its_own(threads: ThreadPoolExecutor, port: int) -> None:
    """Its store may be there for some seconds more."""
    _, first, _, second = watch_two(threads, port, lambda _: None)
    second.tell(Ending(Kind.CAUSE, 137, ["killed"]))
    first.wait_for(lambda watch: not watch.missing)
    with pytest.raises(MachinesLost, match="machine 0 has not come"):
        meet(place(1, port), timeout=1.0)
    assert first.close() and second.close()


def test_a_machine_that_is_named_as_loopback_takes_the_address_others_reach_it_by(
    threads: ThreadPoolExecutor, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian gives a machine's own name 127.0.1.1 in /etc/hosts."""
    monkeypatch.setattr(module, "choose_interfaces", lambda _: None)
    other = Machines(place(1, port), TIMEOUT)
    other._reached = "192.0.2.7"
    later = threads.submit(other.meet)
    first = meet(place(0, port))
    assert first.address == "192.0.2.7"
    later.result(TIMEOUT)


def test_a_machine_0_that_leaves_ends_the_wait(threads: ThreadPoolExecutor, port: int) -> None:
    with pytest.raises(MachinesLost):
        first = Machines(place(0, port, 3, 3), TIMEOUT)
        first._open(time.monotonic() + TIMEOUT)
        later = threads.submit(meet, place(1, port, 3, 3))
        time.sleep(1.0)
        del first
        later.result(TIMEOUT)


class Options:
    """Stands for torchrun's parsed options."""

    max_restarts = 0
    standalone = True


@pytest.mark.parametrize(
    ("nnodes", "restarts", "backend"),
    [("1", 3, "static"), ("2", 0, "static"), ("2", 1, "c10d"), ("2:4", 0, "c10d")],
)
def test_a_run_that_starts_again_on_several_machines_meets_in_rounds(nnodes: str, restarts: int, backend: str) -> None:
    options: Any = Options()
    options.max_restarts = restarts
    where = read_place(["--nnodes", nnodes, "--node-rank=0", "--master-addr=10.0.0.1", "--master-port=7"])
    set_rendezvous(options, where, "10.0.0.1", 60)
    assert options.rdzv_backend == backend and not options.standalone
    if backend == "c10d":
        assert options.rdzv_endpoint == "10.0.0.1:7"
        assert options.rdzv_conf.startswith("is_host=1,join_timeout=110,last_call_timeout=30,")
    else:
        assert (options.master_addr, options.master_port) == ("10.0.0.1", 7)
