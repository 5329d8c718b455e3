"""Takes batches off the loader in a thread, so that the training loop can stop waiting for them.

Step 8 in the life of a batch (`flame.data.loader`).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from flame.data.batch import PackedBatch
from flame.data.loader import PackedLoader
from flame.errors import MachineFault, UserError
from flame.runtime.agreement import run_on_all
from flame.runtime.distributed import get_gpu, use_gpu

logger = logging.getLogger("flame")

DEPTH = 2
"""Batches kept ready in the training process."""
POLL_SECONDS = 0.2
SLOW_START, SLOWEST_START = 60.0, 3600.0
"""Seconds that the workers may take to start: until a warning, and at most."""


class Prefetcher:
    """Takes batches off a loader in a thread.

    Args:
        timeout: `comm.timeout_seconds`. A source that yields nothing is reported after a tenth of it. After nine tenths the run
            ends, before the other ranks, which wait in a collective, time out. The start of the workers does not count.
        rank: of this process, for the message.
    """

    def __init__(self, loader: PackedLoader, timeout: float, rank: int):
        self._loader, self._timeout, self._rank = loader, timeout, rank
        self._ready: queue.Queue[PackedBatch | BaseException] = queue.Queue(DEPTH)
        self._is_closed = threading.Event()
        self._gpu = get_gpu()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def wait_for_start(self, is_stopped: Callable[[], bool]) -> None:
        """Wait until the workers have begun to pack, or cannot, or `is_stopped()` returns True.

        Raises:
            MachineFault: they have not begun after `SLOWEST_START` seconds.
        """
        started, has_warned = time.monotonic(), False
        while not self._loader.has_started and self._thread.is_alive() and not is_stopped():
            time.sleep(POLL_SECONDS / 10)
            waited = time.monotonic() - started
            if waited > SLOWEST_START:
                raise MachineFault(
                    f"rank {self._rank}: the loader's worker processes have not started after {waited:.0f} seconds: the machine "
                    "is too busy; the same command tries again"
                )
            if waited > SLOW_START and not has_warned:
                has_warned = True
                logger.warning("the loader's worker processes are starting for %.0f seconds: the machine is busy", waited)

    def wait_for_all_ranks(self, is_stopped: Callable[[], bool]) -> None:
        """`wait_for_start` on all ranks, however long a busy machine takes: before collectives with a time limit of their own.

        Raises:
            MachineFault: on all ranks.
        """
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * SLOWEST_START))
        try:
            run_on_all(partial(self.wait_for_start, is_stopped), group)
        finally:
            dist.destroy_process_group(group)

    def take(self, count: int, is_stopped: Callable[[], bool]) -> list[PackedBatch] | None:
        """The next `count` batches; None if `is_stopped()` returns True while waiting for them.

        Raises:
            UserError: from the loader, or the source has stalled.
        """
        batches: list[PackedBatch] = []
        started = time.monotonic()
        while len(batches) < count:
            batch = self._take_one(is_stopped, started)
            if batch is None:
                return None
            batches.append(batch)
        return batches

    def _take_one(self, is_stopped: Callable[[], bool], started: float) -> PackedBatch | None:
        has_warned = False
        while True:
            try:
                item = self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if is_stopped():
                    return None
                waited = time.monotonic() - started
                if waited > 0.9 * self._timeout:
                    raise UserError(
                        f"rank {self._rank}: {self._loader.awaited_source} has given nothing for {waited:.0f} seconds: stopped "
                        f"before comm.timeout_seconds = {self._timeout:g} runs out; check the source, or raise it"
                    ) from None
                if waited > 0.1 * self._timeout and not has_warned:
                    has_warned = True
                    logger.warning("%s has given nothing for %.0f seconds", self._loader.awaited_source, waited)
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def close(self) -> None:
        """Stop reading. A thread that is stuck in a source keeps running until the process ends."""
        self._is_closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                break
        self._loader.close()

    def _fill(self) -> None:
        use_gpu(self._gpu)  # batches are put into page-locked memory here
        while not self._is_closed.is_set():
            try:
                item: PackedBatch | BaseException = next(self._loader)
            except BaseException as error:  # passed on to the training loop
                item = error
            self._ready.put(item)
            if isinstance(item, BaseException):
                return
