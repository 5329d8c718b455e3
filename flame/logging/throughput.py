"""Speed and memory of a run: tokens per second, model FLOP/s utilization (MFU), time waiting for data, peak memory."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from flame.logging.metric_names import CUDA_GRAPH_FRACTION, MFU
from flame.logging.metrics import Metrics
from flame.runtime.torchtitan import get_peak_flops


def _get_peak_flops(device: torch.device) -> float:
    """Peak dense bf16 FLOP/s of a GPU by its name, from torchtitan's table. It assumes an A100, with a warning, if unknown."""
    root = logging.getLogger()

    def is_of_interest(record: logging.LogRecord) -> bool:
        return "lspci" not in record.getMessage()  # only needed to distinguish variants of the H100

    root.addFilter(is_of_interest)
    try:
        return get_peak_flops(torch.cuda.get_device_name(device))
    finally:
        root.removeFilter(is_of_interest)


class Flops(NamedTuple):
    """FLOPs of the forward and backward for one packed sequence."""

    next_token: float
    aux_forward: float
    """Of an extra forward of the network, such as the anti-causal pass."""
    heads: float
    """Of the objective's own modules and its loss."""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.next_token + self.aux_forward + self.heads


class Throughput:
    """Measures speed and memory between two log lines.

    Args:
        metrics: receives the values that differ between ranks.
        device: of this process. MFU and device memory exist only on CUDA. On CPUs the memory is that of the process.
        world_size: number of ranks.
        steps_left: optimizer steps that this process will make.
    """

    def __init__(self, metrics: Metrics, device: torch.device, world_size: int, steps_left: int):
        self.metrics = metrics
        self.on_gpu = device.type == "cuda"
        self.peak_flops = world_size * _get_peak_flops(device) if self.on_gpu else None
        self.steps_left = steps_left
        self._new_graph_bytes = 0
        self.restart()

    def restart(self) -> None:
        """Start the next interval."""
        self.data_wait = 0.0
        self.launch = 0.0
        self.tokens = 0
        self.steps = 0
        self.started = time.perf_counter()
        self._graph_bytes = self._new_graph_bytes
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """Exclude the time spent inside, which is not training."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.data_wait += time.perf_counter() - start

    def begin_launch(self) -> None:
        """Count the time until `end_launch` as handing work to the device."""
        self.launch -= time.perf_counter()

    def end_launch(self) -> None:
        """Call it before waiting for the device."""
        self.launch += time.perf_counter()

    def count_graphs(self, replays: int, micro_steps: int, graph_bytes: int) -> None:
        """Count the micro-steps of a step, and those of them that were a CUDA graph.

        Args:
            graph_bytes: memory of all graphs, which torch does not count as allocated once they are captured.
        """
        self.metrics.record_mean(CUDA_GRAPH_FRACTION, replays, micro_steps)
        self._new_graph_bytes = graph_bytes

    def count_step(self, tokens: int) -> None:
        """Count a finished step with `tokens` tokens over all ranks."""
        self.tokens += tokens
        self.steps += 1
        self.steps_left -= 1

    def count_flops(self, flops: Flops) -> None:
        """Count the FLOPs of a packed batch of this rank."""
        self.metrics.record_sum("step_tflops", flops.total / 1e12)
        if self.on_gpu:
            self.metrics.record_sum("mfu", flops.total)
            self.metrics.record_sum("mfu_aux_forward", flops.aux_forward)
            self.metrics.record_sum("mfu_heads", flops.heads)

    def find_own_times(self) -> tuple[float, float]:
        """Seconds a step, since the last line, that this rank has waited for data, and that it took to hand over its work."""
        return self.data_wait / self.steps, self.launch / self.steps

    def record(self) -> None:
        """Record the maxima over ranks: peak memory and time waiting for data. Call before `Metrics.collect`."""
        peak = (
            torch.cuda.max_memory_allocated() + self._graph_bytes
            if self.on_gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        self.metrics.record_max("peak_memory_gib", peak / 2**30)
        self.metrics.record_max("data_wait_seconds", self.data_wait)

    def summarize(self, values: dict[str, float]) -> float:
        """Convert collected sums to rates, in place, and start the next interval.

        Args:
            values: from `Metrics.collect`. Those named in `MFU` hold FLOPs, and become fractions of the peak.

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
