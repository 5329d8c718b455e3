"""The machines of a run: they meet before they start, and tell each other how they end.

The launcher of each machine is a client of one key-value store, which machine 0 serves on MASTER_PORT. torchrun and the workers
use the same store.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, DistNetworkError, TCPStore

from flame.errors import UserError, give_reason
from flame.runtime.endings import LOST_EXIT_CODE, Ending, Kind
from flame.runtime.network import choose_interfaces, find_local_address, is_loopback
from flame.runtime.rendezvous import Place

POLL_SECONDS = 0.5
FIRST_WORD_SECONDS = 5.0
"""A machine that waits longer says for whom."""
WORD_SECONDS = 30.0
FAREWELL_SECONDS = 15.0
"""How long to wait for what the other machines say of their ending. torchrun takes some seconds to end its workers."""
CLOSE_SECONDS = 2.0
MISTAKE_SECONDS = 5.0
"""How long a machine with a mistake waits for the others, to tell them."""
STORE_SECONDS = 30

ENDING = "flame/ending"

logger = logging.getLogger("flame")


class MachinesLost(Exception):
    """Another machine has not come, or has ended before the run began.

    Args:
        ending: what to print and to exit with.
    """

    def __init__(self, ending: Ending):
        super().__init__(*ending.lines)
        self.ending = ending


class Machines:
    """This machine's view of the others.

    Args:
        timeout: seconds that a wait may take, `comm.timeout_seconds`.

    Raises:
        UserError: MASTER_ADDR is wrong.
    """

    def __init__(self, place: Place, timeout: float):
        self.place, self._timeout = place, timeout
        self.address, self._reached = find_local_address(place.host, place.port)
        self._client: TCPStore | None = None
        self._server: TCPStore | None = None
        self.hosts: dict[int, str] = {}
        """Names of the machines that have come, by number."""

    # ---------------------------------------------------------------- before the run

    def meet(self) -> None:
        """Wait until enough machines have come, and choose the network interfaces.

        Raises:
            UserError: a variable of the environment is wrong.
            MachinesLost: a machine did not come in time, or has found a mistake.
        """
        deadline = time.monotonic() + self._timeout
        self._open(deadline)
        for key in (ENDING, "flame/left"):  # of a machine that this one replaces
            self._store.delete_key(f"{key}/{self.place.number}")
        own = {"host": socket.gethostname(), "process": os.getpid(), "reached": self._reached}
        key = f"flame/here/{self.place.number}"
        other = json.loads(self._store.compare_set(key, "", json.dumps(own)).decode())
        if other != own and (self.place.is_elastic or _has_ended(other)):
            self._store.set(key, json.dumps(own))
        elif other != own:
            if self._store.check(["flame/begun"]):
                where = f"{self.place.host}:{self.place.port}"
                line = f"the run at {where} has begun with {other['host']} as machine {self.place.number}"
                raise MachinesLost(Ending(Kind.CAUSE, LOST_EXIT_CODE, [line], self.place.number))
            raise UserError(
                f"NODE_RANK = {self.place.number} (environment) is that of process {other['process']} on {other['host']} too: "
                "give each machine its own"
            )
        try:
            self._wait_for_others(deadline)
        except DistError:
            line = f"machine 0 has left {self.place.host}:{self.place.port} before the run began: see what it says"
            raise MachinesLost(Ending(Kind.CAUSE, LOST_EXIT_CODE, [line], self.place.number)) from None
        if self.place.number == 0 and is_loopback(self.address):
            self._take_address_of_others()
        choose_interfaces(self.address)

    @property
    def _store(self) -> TCPStore:
        assert self._client is not None
        return self._client

    def _open(self, deadline: float, is_silent: bool = False) -> None:
        """Serve the store on machine 0; connect to it on the others."""
        place = self.place
        if place.number == 0:
            try:
                self._server = TCPStore(place.host, place.port, is_master=True, wait_for_workers=False, multi_tenant=True)
            except DistNetworkError as error:
                raise UserError(
                    f"MASTER_PORT = {place.port} (environment) cannot be opened on {socket.gethostname()}, machine 0 "
                    f"({_shorten(error)}): choose another, the same on all machines"
                ) from None
        words = _Words(f"waiting for machine 0 at {place.host}:{place.port}", self._timeout, is_silent)
        while self._client is None:
            try:
                socket.create_connection((place.host, place.port), timeout=max(0.1, deadline - time.monotonic())).close()
                client = TCPStore(
                    place.host, place.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_SECONDS)
                )
                if place.number == 0 or place.is_elastic or not _is_of_earlier_start(client):
                    self._client = client
                    return
            except (OSError, DistError):
                pass
            self._check_time(deadline, f"machine 0 has not come to {place.host}:{place.port}")
            words.say()
            time.sleep(POLL_SECONDS)

    def _wait_for_others(self, deadline: float) -> None:
        place, store = self.place, self._store
        words = _Words("", self._timeout)
        while True:
            if not store.check(["flame/begun"]) and store.check([ENDING]):
                for ending in self._read_endings().values():
                    raise MachinesLost(retell(ending))
            missing = [number for number in range(place.most) if not store.check([f"flame/here/{number}"])]
            here = place.most - len(missing)
            if here >= place.fewest:
                self.read_hosts()
                return
            absent = f"{place.fewest - here} of {place.fewest} machines (NODE_RANK {', '.join(map(str, missing))})"
            self._check_time(deadline, f"{absent} did not come to {place.host}:{place.port}")
            words.say(f"waiting for {absent} to come to {place.host}:{place.port}")
            time.sleep(POLL_SECONDS)

    def _check_time(self, deadline: float, what: str) -> None:
        if time.monotonic() > deadline:
            line = f"{what} within comm.timeout_seconds = {self._timeout:g}: start the same command there"
            raise MachinesLost(Ending(Kind.CAUSE, LOST_EXIT_CODE, [line], self.place.number))

    def _take_address_of_others(self) -> None:
        """On machine 0, whose name may be a loopback address for itself alone: the address that the others reach it by."""
        for number in range(1, self.place.most):
            key = f"flame/here/{number}"
            if self._store.check([key]) and not is_loopback(reached := json.loads(self._store.get(key))["reached"]):
                self.address = reached
                return

    # ---------------------------------------------------------------- while it runs

    def watch(self, act: Callable[[Ending], None]) -> Watch:
        """Begin to watch for the ending of other machines.

        Args:
            act: called with each, in a thread of its own.
        """
        self._store.set("flame/begun", "")
        return Watch(self, act)

    def _put(self, ending: Ending) -> None:
        ending.machine = self.place.number
        self._store.set(f"{ENDING}/{self.place.number}", ending.to_json())
        self._store.set(ENDING, "")

    def _read_endings(self) -> dict[int, Ending]:
        """Those of the other machines, by number."""
        others = [number for number in range(self.place.most) if number != self.place.number]
        found = {
            number: Ending.from_json(self._store.get(f"{ENDING}/{number}").decode())
            for number in others
            if self._store.check([f"{ENDING}/{number}"])
        }
        for number in found:
            self._store.set(f"flame/read/{number}/{self.place.number}", "")
        return found

    def read_hosts(self) -> None:
        """Fill `hosts`."""
        for number in range(self.place.most):
            if self._store.check([f"flame/here/{number}"]):
                self.hosts[number] = json.loads(self._store.get(f"flame/here/{number}"))["host"]

    def have_read(self, others: Iterable[int]) -> bool:
        """Whether other machines have read of this one's ending."""
        return all(self._store.check([f"flame/read/{self.place.number}/{other}"]) for other in others)

    def leave(self) -> None:
        """Say that this machine will read no more endings."""
        self._store.set(f"flame/left/{self.place.number}", "")

    def has_heard(self, other: int) -> bool:
        """Whether another machine has read how this one ended, or reads no more."""
        return self.have_read([other]) or self._store.check([f"flame/left/{other}"])


class Watch:
    """Exchanges endings with the other machines in a thread, which may hang in a broken network without harm."""

    def __init__(self, machines: Machines, act: Callable[[Ending], None]):
        self._machines, self._act = machines, act
        self._changed = threading.Condition()
        self._own: Ending | None = None
        self.others: dict[int, Ending] = {}
        """The last word of each machine that has ended, and has not come back."""
        self.is_heard = False
        """Whether all others that have come have read how this machine ended, or read no more."""
        self.is_told = False
        """Whether the others can read how this machine ended."""
        self.is_store_lost = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="machines", daemon=True)
        self._thread.start()

    def tell(self, ending: Ending) -> None:
        """Tell the other machines how this one has ended."""
        with self._changed:
            self._own, self.is_told = ending, False
            self._changed.notify_all()

    def wait_for(self, is_enough: Callable[[Watch], bool]) -> None:
        """Wait for what others tell, for as long as `FAREWELL_SECONDS`."""
        deadline = time.monotonic() + FAREWELL_SECONDS
        with self._changed:
            while not is_enough(self) and not self.is_store_lost and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)

    def close(self) -> bool:
        """End the thread. Returns False if it hangs in the network: then the process must end without waiting for it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        return not self._thread.is_alive()

    @property
    def missing(self) -> list[int]:
        """Machines that have come, and have not told how they ended."""
        return [number for number in self._others if number not in self.others]

    @property
    def _others(self) -> list[int]:
        return [number for number in sorted(self._machines.hosts) if number != self._machines.place.number]

    def list_causes(self, ending: Ending) -> list[Ending]:
        """What other machines have told that may have led to this one's ending, a mistake first, and a suspect last."""
        kinds = list(Kind)
        found = [each for each in self.others.values() if kinds.index(each.kind) < kinds.index(ending.kind)]
        return sorted(found, key=lambda each: kinds.index(each.kind))

    def _run(self) -> None:
        try:
            while not self._is_closed:
                with self._changed:
                    self._changed.wait_for(lambda: self._own is not None or self._is_closed, POLL_SECONDS)
                    own, self._own = self._own, None
                if own is not None:
                    self._machines._put(own)
                    self._machines.read_hosts()
                found = self._machines._read_endings() if self._machines._store.check([ENDING]) else {}
                # Not while the run goes on: each look of each machine at each other one would be much for the store.
                has_ended = self.is_told or own is not None
                is_heard = has_ended and all(map(self._machines.has_heard, self._others))
                with self._changed:
                    new = {number: each for number, each in found.items() if self.others.get(number) != each}
                    self.others, self.is_heard = found, is_heard
                    self.is_told = self.is_told or own is not None
                    self._changed.notify_all()
                for ending in new.values():  # which may wait: not in this thread
                    threading.Thread(target=self._act, args=(ending,), daemon=True).start()
            self._machines.leave()
        except DistError:
            with self._changed:
                self.is_store_lost = True
                self._changed.notify_all()


class _Words:
    """Says on stderr what a wait is for: after some seconds, and now and then again."""

    def __init__(self, what: str, timeout: float, is_silent: bool = False):
        self._what, self._timeout, self._is_silent = what, timeout, is_silent
        self._next = time.monotonic() + FIRST_WORD_SECONDS

    def say(self, what: str = "") -> None:
        if not self._is_silent and time.monotonic() > self._next:
            self._next += WORD_SECONDS
            print(f"{what or self._what}, for at most {self._timeout:g} s", file=sys.stderr, flush=True)


def tell_mistake(place: Place, mistake: UserError) -> None:
    """Tell the other machines, for as long as `MISTAKE_SECONDS`, of a mistake that this one has met before they start."""
    deadline = time.monotonic() + MISTAKE_SECONDS
    with suppress(UserError, MachinesLost, DistError):
        machines = Machines(place, MISTAKE_SECONDS)
        machines._open(deadline, is_silent=True)
        if machines._store.check(["flame/begun"]):
            return  # a run that is under way does not end because a command beside it is wrong
        machines._put(Ending(Kind.MISTAKE, UserError.EXIT_CODE, mistake.lines))
        while place.number == 0 and time.monotonic() < deadline and not machines.have_read(range(1, place.most)):
            time.sleep(0.1)


def retell(ending: Ending) -> Ending:
    """Another machine's ending as this machine's own: lines name the machine, and what was an exit code there is a loss here."""
    if ending.kind == Kind.MISTAKE:
        lines, code = [f"machine {ending.machine} ({ending.host}): {line}" for line in ending.lines], ending.exit_code
    else:
        lines, code = ending.lines, ending.exit_code if ending.kind == Kind.STOPPED else LOST_EXIT_CODE
    return Ending(ending.kind, code, lines, ending.machine, ending.host)


def _shorten(error: Exception) -> str:
    return "in use" if "EADDRINUSE" in str(error) else give_reason(error, 200)


def _has_ended(other: dict[str, Any]) -> bool:
    """Whether the process that came with this machine's number was one of this host and is gone: it was started again."""
    if other["host"] != socket.gethostname():
        return False
    try:
        os.kill(other["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _is_of_earlier_start(client: TCPStore) -> bool:
    """Whether the store is that of a run that has ended and is about to leave."""
    return client.check(["flame/begun"]) and client.check([ENDING])
