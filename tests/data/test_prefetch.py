"""Waiting for data: prefetching, giving up, stalled sources."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from flame.data import prefetch as prefetch_module
from flame.data.prefetch import Prefetcher
from flame.errors import MachineFault, UserError


class FakeLoader:
    """Hands out numbers, and waits for leave before each of those in `gates`."""

    awaited_source = 'training.dataset = "slow"'
    has_started = True

    def __init__(self, gates: dict[int, threading.Event] | None = None, fault: BaseException | None = None):
        self.gates, self.fault, self.handed_out, self.is_closed = gates or {}, fault, 0, False

    def __next__(self) -> int:
        if self.handed_out in self.gates:
            assert self.gates[self.handed_out].wait(30)
        if self.fault is not None and self.handed_out == 2:
            raise self.fault
        self.handed_out += 1
        return self.handed_out - 1

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def opened() -> Iterator[list[Prefetcher]]:
    prefetchers: list[Prefetcher] = []
    yield prefetchers
    for prefetcher in prefetchers:
        prefetcher.close()
        assert not prefetcher._thread.is_alive()


def open_prefetcher(opened: list[Prefetcher], loader: FakeLoader, timeout: float = 600.0) -> Prefetcher:
    opened.append(Prefetcher(loader, timeout, rank=3))  # type: ignore[arg-type]
    return opened[-1]


def never() -> bool:
    return False


def test_batches_come_in_order_and_few_are_read_ahead(opened: list[Prefetcher]) -> None:
    loader = FakeLoader()
    prefetcher = open_prefetcher(opened, loader)
    assert prefetcher.take(3, never) == [0, 1, 2]
    assert prefetcher.take(2, never) == [3, 4]
    assert loader.handed_out <= 5 + prefetch_module.DEPTH + 1
    prefetcher.close()
    assert loader.is_closed


def test_waiting_ends_when_asked_to_stop_and_what_is_there_is_taken_first(opened: list[Prefetcher]) -> None:
    gate = threading.Event()
    prefetcher = open_prefetcher(opened, FakeLoader({1: gate}))
    assert prefetcher.take(1, lambda: True) == [0]
    assert prefetcher.take(1, lambda: True) is None
    gate.set()
    assert prefetcher.take(1, never) == [1]


@pytest.mark.parametrize("fault", [UserError("one line"), RuntimeError("broken worker")])
def test_errors_reach_the_training_loop_as_they_are(opened: list[Prefetcher], fault: Exception) -> None:
    prefetcher = open_prefetcher(opened, FakeLoader(fault=fault))
    assert prefetcher.take(2, never) == [0, 1]
    with pytest.raises(type(fault)) as caught:
        prefetcher.take(1, never)
    assert caught.value is fault


def test_a_stalled_source_is_named_and_then_ends_the_run(
    opened: list[Prefetcher], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a clock that moves 10 seconds at each look: named after a tenth of the 600 seconds, ended after nine tenths."""
    now = 0.0

    def tick() -> float:
        nonlocal now
        now += 10.0
        return now

    monkeypatch.setattr(prefetch_module, "time", SimpleNamespace(monotonic=tick))
    monkeypatch.setattr(prefetch_module, "POLL_SECONDS", 0.001)
    gate = threading.Event()
    prefetcher = open_prefetcher(opened, FakeLoader({0: gate}))
    with caplog.at_level(logging.WARNING, "flame"), pytest.raises(UserError) as caught:
        prefetcher.take(1, never)
    gate.set()
    assert [record.getMessage() for record in caplog.records] == ['training.dataset = "slow" has given nothing for 70 seconds']
    assert str(caught.value) == (
        'rank 3: training.dataset = "slow" has given nothing for 550 seconds: stopped before comm.timeout_seconds = 600 runs '
        "out; check the source, or raise it"
    )


def test_workers_that_start_slowly_are_waited_for_and_no_source_is_blamed(
    opened: list[Prefetcher], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a clock that moves 10 seconds at each look, with a limit of 6 seconds for sources; the workers take 300."""
    loader, looks = FakeLoader({0: (gate := threading.Event())}), []
    loader.has_started = False

    def tick() -> float:
        looks.append(1)
        if len(looks) == 30:
            loader.has_started = True
        return 10.0 * len(looks)

    monkeypatch.setattr(prefetch_module, "time", SimpleNamespace(monotonic=tick, sleep=lambda seconds: None))
    prefetcher = open_prefetcher(opened, loader, timeout=6.0)
    with caplog.at_level(logging.WARNING, "flame"):
        prefetcher.wait_for_start(never)
    assert caplog.messages == ["the loader's worker processes are starting for 70 seconds: the machine is busy"]
    loader.has_started = False
    prefetcher.wait_for_start(lambda: True)
    monkeypatch.setattr(prefetch_module, "SLOWEST_START", 100.0)
    with pytest.raises(MachineFault, match="rank 3: the loader's worker processes have not started after 110 seconds"):
        prefetcher.wait_for_start(never)
    gate.set()


def test_a_loader_that_fails_at_its_start_is_not_waited_for(opened: list[Prefetcher]) -> None:
    loader = FakeLoader(fault=UserError("one line"))
    loader.handed_out, loader.has_started = 2, False
    prefetcher = open_prefetcher(opened, loader)
    prefetcher.wait_for_start(never)
    with pytest.raises(UserError, match="one line"):
        prefetcher.take(1, never)
