"""What an asynchronous save runs in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flame.checkpoints.staging import HostStaging
from flame.runtime.distributed import get_gpu, use_gpu

logger = logging.getLogger("flame")


class Background:
    """Host copies and a thread, for asynchronous saves."""

    def __init__(self) -> None:
        self.staging = HostStaging()
        self._thread = ThreadPoolExecutor(1, "checkpoint", use_gpu, (get_gpu(),))
        self._running: Future[None] | None = None

    def start(self, action: Callable[..., None], *arguments: Any) -> None:
        self._running = self._thread.submit(action, *arguments)

    def wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        self._thread.shutdown()
        try:
            self.wait()
        except Exception as error:
            logger.error("%s", error)
