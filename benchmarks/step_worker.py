"""Steps of the trainer in this process, timed: the worker of `benchmarks.step` and `benchmarks.node`.

    python -m benchmarks.step_worker SPEC.json

SPEC.json holds the options of the run, how many steps warm up, are timed and are profiled, and where the result goes
(`Spec`). Under torchrun it is one rank, and rank 0 writes the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import flame.train
from benchmarks.pool import Job, launch, wait_for_turn
from flame.logging.plots import read_metrics
from flame.models import output_head
from flame.runtime.distributed import end_processes, get_world_size, set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options


@dataclass
class Spec:
    """What a worker does."""

    options: list[str]
    """Of the run."""
    result: str
    """File for the result, JSON."""
    warmup: int = 4
    steps: int = 8
    """Timed ones."""
    profiled: int = 4
    layouts: int = 0
    """Steps over which compilations are counted."""


def list_options(run: Path, model: Path, corpus: Path, tokens: int, further: Sequence[str]) -> list[str]:
    """Options of a run: bfloat16, compiled, documents of up to 4,096 tokens of `packs.write_corpus`, no checkpoints.

    Args:
        run: its folder.
        tokens: a step and GPU.
    """
    values: dict[str, object] = {
        "job.dump_folder": run,
        "model.config": model,
        "model.tokenizer_path": "bytes",
        "training.dataset": "json",
        "training.data_files": corpus,
        "training.seq_len": tokens,
        "training.context_len": min(tokens, 4096),
        "training.compile": "true",
        "training.steps": 100_000,
        "training.num_streams": 8,
        "checkpoint.enable_checkpoint": "false",
        "metrics.log_freq": 1_000_000,
        "metrics.diagnostics_interval": 0,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))] + list(further)


def build_job(name: str, gpus: int, spec: Spec, file: Path, seconds: float) -> Job:
    """A job whose processes are ranks of one run. Writes its spec to a file."""
    file.write_text(json.dumps(asdict(spec)))
    return Job(name, gpus, launch(gpus, "benchmarks.step_worker", [str(file)]), seconds, waits=True)


class Phases:
    """Times named parts of steps between CUDA events."""

    def __init__(self) -> None:
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events[name].append((start, end))

    def wrap(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def list_ms(self) -> dict[str, list[float]]:
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in self._events.items()}


def instrument(trainer: Trainer, phases: Phases, stack: contextlib.ExitStack) -> None:
    """Time the parts of the trainer's steps, in place."""
    model = trainer.model
    places = [
        (model, "encode_future", "anti-causal forward"),
        (model, "encode_past", "causal forward"),
        (output_head, "linear_cross_entropy", "cross entropy"),
        *([(trainer.objective, "loss", "predictor and InfoNCE")] if trainer.objective is not None else []),
        (torch.Tensor, "backward", "backward"),
        (flame.train, "clip_grad_norm_", "clipping"),
        (trainer.optimizer, "step", "optimizer"),
    ]
    for holder, attribute, name in places:
        stack.enter_context(patch.object(holder, attribute, phases.wrap(name, getattr(holder, attribute))))


def find_gaps(trainer: Trainer, steps: int) -> dict[str, float]:
    """Share of the time of some steps in which no kernel runs, and in which only NCCL's do."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            trainer.train_step()
        torch.cuda.synchronize()
    kernels = [
        (event.start_ns(), event.start_ns() + event.duration_ns(), "nccl" in event.name())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
        and event.duration_ns()
        and not event.is_user_annotation()  # parts of a step that the trainer names: no work of the GPU
        and not event.name().startswith(("FSDP::", "Optimizer.", "Profiler"))
    ]
    return sum_gaps([kernel for kernel in kernels if not kernel[2] or get_world_size() > 1])


def sum_gaps(kernels: list[tuple[int, int, bool]]) -> dict[str, float]:
    """Shares of the time from the first kernel's start to the last one's end.

    Args:
        kernels: start, end, whether it is NCCL's.
    """
    start, end = min(k[0] for k in kernels), max(k[1] for k in kernels)
    everything = count_covered([k[:2] for k in kernels])
    computing = count_covered([k[:2] for k in kernels if not k[2]])
    return {"idle": 1 - everything / (end - start), "exposed communication": (everything - computing) / (end - start)}


def count_covered(intervals: list[tuple[int, int]]) -> int:
    """Length of the union of intervals."""
    total, reached = 0, None
    for start, end in sorted(intervals):
        if reached is None or start > reached:
            total += end - start
            reached = end
        elif end > reached:
            total += end - reached
            reached = end
    return total


def run_worker(spec: Spec) -> None:
    """One run, in this process, its numbers to a file."""
    set_single_process_defaults()
    config = read_options(spec.options, get_world_size())
    trainer = Trainer(config)
    trainer._resume()
    trainer._open_run()
    phases = Phases()
    for _ in range(spec.warmup):
        trainer.train_step()
    trainer.meters.log_step(trainer.step, trainer.counters)  # the next line covers the timed steps alone
    with contextlib.ExitStack() as stack:
        instrument(trainer, phases, stack)
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(spec.steps + 1)]
        for event in starts[:-1]:
            event.record()
            trainer.train_step()
        starts[-1].record()
    parts = {name: statistics.median(times) for name, times in phases.list_ms().items()}
    trainer.meters.log_step(trainer.step, trainer.counters)
    logged = trainer.step
    result: dict[str, Any] = {"steps_ms": [a.elapsed_time(b) for a, b in pairwise(starts)], "parts_ms": parts}
    result |= find_gaps(trainer, spec.profiled) if spec.profiled else {}
    before = counters["stats"]["unique_graphs"]
    for _ in range(spec.layouts):
        trainer.train_step()
    result["compiled later"] = counters["stats"]["unique_graphs"] - before if spec.layouts else None
    trainer._close_run()
    end_processes()
    if int(os.environ["RANK"]) == 0:
        row = next(row for row in read_metrics(Path(config.job.dump_folder)) if row["step"] == logged)
        result |= {"peak_gib": row["peak_memory_gib"], "mfu": row.get("mfu"), "tokens_per_second": row["tokens_per_second"]}
        Path(spec.result).write_text(json.dumps(result))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Timed steps of the trainer.", allow_abbrev=False)
    parser.add_argument("spec", type=Path, help="JSON file, see Spec")
    arguments = parser.parse_args(argv)
    if not wait_for_turn():
        return
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    run_worker(Spec(**json.loads(arguments.spec.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
