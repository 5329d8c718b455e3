"""Traces of steps and snapshots of GPU memory, by torch's own tools. Without `[profiling]` it does nothing.

`docs/profiling.md` shows how to read what it writes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from flame.config.profiling import Profiling, read_spans
from flame.errors import UserError

logger = logging.getLogger("flame")

PROFILE_FOLDER = "profile"
MOST_EVENTS = 200_000
"""Allocations and releases that the memory's history holds; older ones are dropped."""


class Profiler:
    """What one rank records.

    Args:
        options: `[profiling]`.
        folder: of the run.
        steps: from those already done to those of the whole run.
    """

    def __init__(self, options: Profiling, folder: Path, rank: int, steps: range):
        self._folder, self._rank = folder / PROFILE_FOLDER, rank
        self._on_gpu = torch.cuda.is_available()
        is_chosen = options.includes_rank(rank)
        spans = read_spans(options.trace_steps) or []
        due = [(max(first, steps.start + 1), min(last, steps.stop)) for first, last in spans]
        self._spans = [(first, last) for first, last in due if first <= last] if is_chosen else []
        memory = read_spans(options.memory_steps) or []
        self._memory_steps = {step for first, last in memory for step in range(first, last + 1)} if is_chosen else set()
        self._tracing: profile | None = None
        if options.memory_history and self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)

    @contextmanager
    def watch(self, step: int, count_graph_bytes: Callable[[], int] = int) -> Iterator[None]:
        """Record the step that is made inside, as far as that is asked for.

        Args:
            count_graph_bytes: `MicroStep.graph_bytes` at the end; 0 without.

        Raises:
            UserError: the GPU's memory has run out. A snapshot of it is written first.
        """
        self._begin(step)
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(self._explain_memory(step, error, count_graph_bytes())) from error
        self._end(step)

    def close(self) -> None:
        """Write the trace of a span that the run did not complete."""
        if self._tracing is not None:
            self._tracing.stop()
            self._tracing = None

    def _begin(self, step: int) -> None:
        if self._tracing is not None or not self._spans:
            return
        first, last = self._spans[0]
        # The profiler's own start would be part of the first step it sees, so it sees the one before too.
        if step not in (first - 1, first):
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        phases = schedule(wait=0, warmup=first - step, active=last - first + 1, repeat=1)
        path = self._name_file(f"trace-steps-{first}-{last}", "json.gz")

        def write(traced: profile) -> None:
            traced.export_chrome_trace(str(path))
            logger.info("trace of steps %d to %d: %s", first, last, path)

        self._tracing = profile(activities=activities, schedule=phases, record_shapes=True, on_trace_ready=write)
        self._tracing.start()

    def _end(self, step: int) -> None:
        if self._tracing is not None:
            self._tracing.step()
            if step >= self._spans[0][1]:
                self._tracing.stop()
                self._tracing = None
                self._spans.pop(0)
        if step in self._memory_steps and self._on_gpu:
            path = self._write_snapshot(f"memory-step-{step}")
            logger.info("snapshot of the GPU's memory after step %d: %s", step, path)

    def _explain_memory(self, step: int, error: torch.OutOfMemoryError, graph_bytes: int) -> str:
        gib = (torch.cuda.max_memory_allocated() + graph_bytes) / 2**30
        graphs = f"set training.cuda_graphs = false, which frees {graph_bytes / 2**30:.1f} GiB, " if graph_bytes else ""
        try:
            where = f"; a snapshot of it is {self._write_snapshot(f'out-of-memory-step-{step}')} (docs/profiling.md)"
        except OSError as failure:
            where = f"; no snapshot could be written ({failure.strerror})"
        return (
            f"step {step}: rank {self._rank} has run out of GPU memory, of which it had taken {gib:.1f} GiB: {graphs}lower "
            f"training.seq_len, set activation_checkpoint.mode, or use more GPUs{where} [{' '.join(str(error).split())[:120]}]"
        )

    def _write_snapshot(self, name: str) -> Path:
        path = self._name_file(name, "pickle")
        torch.cuda.memory._dump_snapshot(str(path))
        return path

    def _name_file(self, name: str, suffix: str) -> Path:
        self._folder.mkdir(exist_ok=True)
        return self._folder / f"{name}-rank-{self._rank}.{suffix}"
