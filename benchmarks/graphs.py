"""Steps of small models with their micro-step launched kernel by kernel, and as one CUDA graph. Prints a table.

    python -m benchmarks.graphs OUT [--models 15M 25M 125M] [--tokens 16384 32768]

Llamas of `configs/models`, documents of mean length 1,024, AdamW included: next token, the exact future loss, a cheap one. They
take turns, step by step, on one model in one process. "busy" is the time in which a kernel runs, from a profile of three steps:
no way to launch them can be faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile

from benchmarks.packs import draw_batch
from benchmarks.settings import FUTURE
from benchmarks.timing import Report, Timing, measure_side_by_side
from benchmarks.training_step import TrainingStep, free_memory, read_step_options
from flame.attention import flash as flash_kernels
from flame.config.schema import Training
from flame.models.causal_lm import load_model_config
from flame.objectives.future.options import FutureOptions
from flame.runtime.distributed import end_processes, set_single_process_defaults, start_processes

MODELS = Path(__file__).parent.parent / "configs" / "models"
REPEATS, WARMUP, PROFILED = 15, 4, 3
CHEAP = ["--future_encoder.layers", "2", "--future_encoder.max_anchors", "8192"]
SETTINGS = {"next token": None, "future": FUTURE, "first 2 layers, 8,192 anchors": [*FUTURE, *CHEAP]}
HEADER = ["model", "tokens", "step", "one by one, ms", "graph, ms", "ratio", "busy, ms", "tokens/s"]


def measure_busy(step: Callable[[], None]) -> float:
    """Milliseconds of a step in which a kernel runs. They follow one another on a small model, so their sum is meant."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    kernels = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    own = [event.self_device_time_total for event in kernels if not event.is_user_annotation]
    return sum(own) / PROFILED / 1000


def list_rows(model: str, tokens: int, mesh: DeviceMesh) -> list[list[str]]:
    path = MODELS / f"llama_{model}.json"
    config = load_model_config(str(path))
    step = TrainingStep(config, read_step_options(path, tokens, FUTURE), mesh)
    step.take(draw_batch(tokens, config.vocab_size))

    rows = []
    for name, options in SETTINGS.items():
        if options is not None:
            own = read_step_options(path, tokens, options).get(FutureOptions)
            assert isinstance(own, FutureOptions)
            step.choose(own)
        runs = {way: partial(step.step, options is not None, graphed=way == "graph") for way in ("one by one", "graph")}
        launched, graphed = measure_side_by_side(runs, REPEATS, WARMUP).values()
        assert isinstance(launched, Timing) and isinstance(graphed, Timing)
        busy = measure_busy(runs["graph"])
        ratio, speed = launched.median_ms / graphed.median_ms, tokens / graphed.median_ms * 1000
        rows.append([model, f"{tokens:,}", name, launched.show(), graphed.show(), f"{ratio:.2f}", f"{busy:.1f}", f"{speed:,.0f}"])
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Small models with and without CUDA graphs.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for graphs.md")
    parser.add_argument("--models", nargs="+", default=["15M", "25M", "125M"], help="of configs/models (%(default)s)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16_384, 32_768], help="of a step (%(default)s)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    set_single_process_defaults()
    _, mesh = start_processes(Training(), timeout_seconds=600)
    report = Report(arguments.out / "graphs.md")
    report.write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {flash_kernels.describe(64)}")
    rows: list[list[str]] = []
    for model in arguments.models:
        for tokens in arguments.tokens:
            rows += list_rows(model, tokens, mesh)
            free_memory()
            print(rows[-len(SETTINGS) :], file=sys.stderr, flush=True)
    report.table("Steps of small models", HEADER, rows)
    end_processes()


if __name__ == "__main__":
    main(sys.argv[1:])
