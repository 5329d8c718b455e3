"""Requests to stop: the first is remembered, a second ends the process, and workers do not outlive their launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from flame.runtime.signals import LAUNCHER_PID, PREEMPTED_EXIT_CODE, SAME_REQUEST_SECONDS, STOP_SIGNALS, StopListener
from tests.support.paths import REPO

# Long after the time within which signals count as one request.
LATER = SAME_REQUEST_SECONDS + 1.0

SAVES_WHEN_ASKED = """
import sys, time
from flame.runtime.signals import PREEMPTED_EXIT_CODE, StopListener
with StopListener() as listener:
    print("ready", flush=True)
    while listener.requested is None:
        time.sleep(0.01)
    time.sleep(1.0)
    print("saved for", listener.requested, "with torch" if "torch" in sys.modules else "alone")
sys.exit(PREEMPTED_EXIT_CODE)
"""

STUCK_IN_C = """
import ctypes
from flame.runtime.signals import StopListener
with StopListener() as listener:
    print("ready", flush=True)
    mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
"""

STARTS_ORPHAN = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""

OUTLIVES_PARENT = """
import os, time
from flame.runtime.signals import StopListener
parent = os.getppid()
with StopListener():
    print("ready", flush=True)
    while os.getppid() == parent:
        time.sleep(0.01)
    time.sleep(3.0)
    print("still here", flush=True)
"""


def build_environment(environment: dict[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("TORCHELASTIC_RUN_ID", LAUNCHER_PID)}
    return {**inherited, "PYTHONPATH": str(REPO), **environment}


@contextmanager
def start(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python until it says that it is ready; ended in any case."""
    environment = build_environment(environment)
    with subprocess.Popen([sys.executable, "-c", *command], env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("stop", STOP_SIGNALS)
def test_remembers_the_first_signal_and_restores_what_it_found(stop: signal.Signals) -> None:
    found = [signal.signal(each, signal.SIG_IGN) for each in STOP_SIGNALS]
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    fd_found = signal.set_wakeup_fd(writing.fileno())
    try:
        with StopListener() as listener:
            assert listener.requested is None
            for each in (stop, *STOP_SIGNALS):
                signal.raise_signal(each)
                assert listener.requested == stop.name
        assert [signal.getsignal(each) for each in STOP_SIGNALS] == [signal.SIG_IGN, signal.SIG_IGN]
        assert signal.set_wakeup_fd(-1) == writing.fileno()
    finally:
        signal.set_wakeup_fd(fd_found)
        for each, handler in zip(STOP_SIGNALS, found, strict=True):
            signal.signal(each, handler)
        reading.close()
        writing.close()


def test_signals_at_once_are_one_request() -> None:
    with start(SAVES_WHEN_ASKED) as process:
        for stop in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(stop)
            time.sleep(0.05)
        output, _ = process.communicate(timeout=60)
        assert (process.returncode, output) == (PREEMPTED_EXIT_CODE, "saved for SIGUSR1 alone\n")


@pytest.mark.parametrize("second", STOP_SIGNALS)
def test_a_second_request_ends_a_process_stuck_in_c(second: signal.Signals) -> None:
    with start(STUCK_IN_C) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(LATER)
        process.send_signal(signal.SIGINT)  # no request
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(timeout=60) == 128 + second


@pytest.mark.parametrize(("environment", "output"), [({"TORCHELASTIC_RUN_ID": "x"}, ""), ({}, "still here\n")])
def test_ends_with_the_launcher_but_without_one_outlives_its_parent(environment: dict[str, str], output: str) -> None:
    with start(STARTS_ORPHAN, OUTLIVES_PARENT, **environment) as parent:
        parent.kill()
        assert parent.communicate(timeout=60)[0] == output


def test_ends_if_the_launcher_died_before_it_began_to_listen() -> None:
    """Then the parent that it finds is another one."""
    environment = build_environment({"TORCHELASTIC_RUN_ID": "x", LAUNCHER_PID: str(os.getppid())})
    assert subprocess.run([sys.executable, "-c", STUCK_IN_C], env=environment, capture_output=True, timeout=60).returncode == 1
