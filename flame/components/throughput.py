"""Speed and memory of a run: tokens a second, share of the peak FLOP/s, time waited for data, peak memory."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flame.components.flops import Flops
from flame.components.metrics import Metrics
from flame.components.titan import get_peak_flops

MFU = ("mfu", "mfu_future", "mfu_heads")


def _get_peak_flops(device: torch.device) -> float:
    """Dense bf16 FLOP/s of a GPU by its name, from the library's table; it warns where it must assume an A100."""
    root = logging.getLogger()

    def is_of_interest(record: logging.LogRecord) -> bool:
        return "lspci" not in record.getMessage()  # only asked to tell variants of the H100 apart

    root.addFilter(is_of_interest)
    try:
        return get_peak_flops(torch.cuda.get_device_name(device))
    finally:
        root.removeFilter(is_of_interest)


class Throughput:
    """Measures between two log lines.

    Args:
        metrics: where what differs between ranks is recorded.
        device: of this process; MFU and device memory exist on CUDA only, elsewhere the process's memory is shown.
        world_size: ranks.
        steps_left: optimizer steps that this process will make.
    """

    def __init__(self, metrics: Metrics, device: torch.device, world_size: int, steps_left: int):
        self.metrics = metrics
        self.on_gpu = device.type == "cuda"
        self.peak_flops = world_size * _get_peak_flops(device) if self.on_gpu else None
        self.steps_left = steps_left
        self.restart()

    def restart(self) -> None:
        """Start the next interval."""
        self.data_wait = 0.0
        self.tokens = 0
        self.steps = 0
        self.started = time.perf_counter()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """Time spent inside, on something else than training, does not count."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent inside counts as waiting."""
        start = time.perf_counter()
        yield
        self.data_wait += time.perf_counter() - start

    def count_step(self, tokens: int) -> None:
        """Count a finished step over `tokens` tokens of all ranks."""
        self.tokens += tokens
        self.steps += 1
        self.steps_left -= 1

    def count_flops(self, flops: Flops) -> None:
        """Count a packed batch of this rank."""
        self.metrics.record_sum("step_tflops", sum(flops) / 1e12)
        if self.on_gpu:
            self.metrics.record_sum("mfu", sum(flops))
            self.metrics.record_sum("mfu_future", flops.future)
            self.metrics.record_sum("mfu_heads", flops.heads)

    def record(self) -> None:
        """Record what the ranks have to agree on; call before `Metrics.collect`."""
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.metrics.record_max("peak_memory_gib", peak / 2**30)
        self.metrics.record_max("data_wait_seconds", self.data_wait)

    def summarize(self, values: dict[str, float]) -> float:
        """Turn collected sums into rates, in place, and start the next interval.

        Args:
            values: from `Metrics.collect`; those of `MFU` hold FLOPs and become fractions of the peak.

        Returns:
            seconds left in the run, at the rate of this interval.
        """
        elapsed = time.perf_counter() - self.started
        for name in MFU:
            if name in values:
                assert self.peak_flops is not None
                values[name] /= elapsed * self.peak_flops
        values["step_tflops"] /= self.steps
        values["data_wait_fraction"] = values["data_wait_seconds"] / elapsed
        values["tokens_per_second"] = self.tokens / elapsed
        values["step_seconds"] = elapsed / self.steps
        self.restart()
        return values["step_seconds"] * self.steps_left
