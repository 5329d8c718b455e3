"""Where the time of a training step goes: the trainer itself at the shape of Llama-3.2-1B. Prints tables, draws OUT/step.png.

    python -m benchmarks.step OUT [--tokens 65536] [--steps 8] [--gpus 1] [--layouts 0]

Three runs: next token alone, with the future loss, and with it in fp8; each on documents of mean length 1,024, AdamW included.
--variants takes other settings of `benchmarks.settings`. Where not all steps have the loss, the mean is the cost.

Phases are taken between CUDA events on the compute stream, medians over the steps after the first four. Then a profile of four
steps gives the share of time in which no kernel runs (what the GPU waits for: launches, data, the verdict on the step) and in
which only NCCL's run (communication that is not hidden). Before the first phase, H2D copies; "rest" is what lies between phases.
--layouts N makes N more steps, of as many document layouts, and counts what was compiled after the third step of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import flame.train
from benchmarks.packs import write_corpus
from benchmarks.settings import MEASURED, SETTINGS
from benchmarks.timing import Report
from flame.models import output_head
from flame.runtime.distributed import end_processes, get_world_size, set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options

REPO = Path(__file__).parent.parent
PHASES = ["anti-causal forward", "causal forward", "cross entropy", "predictor and InfoNCE", "backward", "clipping", "optimizer"]
WARMUP = 4
PROFILED = 4


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


def find_gaps(trainer: Trainer) -> dict[str, float]:
    """Share of the time of some steps in which no kernel runs, and in which only NCCL's do."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            trainer.train_step()
        torch.cuda.synchronize()
    kernels = [
        (event.start_ns(), event.start_ns() + event.duration_ns(), "nccl" in event.name())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
        and event.duration_ns()
        and not event.name().startswith(("FSDP::", "Optimizer.", "Profiler"))
    ]
    kernels = [kernel for kernel in kernels if not kernel[2] or get_world_size() > 1]
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


def run_worker(arguments: argparse.Namespace) -> None:
    """One run, in this process, its numbers to a file."""
    set_single_process_defaults()
    out: Path = arguments.out
    config = read_options(
        [
            *("--job.dump_folder", str(out / "run"), "--model.config", str(REPO / "configs" / "models" / "llama_1B.json")),
            *("--model.tokenizer_path", "bytes", "--training.dataset", "json", "--training.data_files", str(arguments.corpus)),
            *("--training.seq_len", str(arguments.tokens), "--training.context_len", "4096", "--training.compile", "true"),
            *("--training.steps", "100000", "--training.num_streams", "8"),
            *("--checkpoint.enable_checkpoint", "false", "--metrics.log_freq", "1000000", *SETTINGS[arguments.variant]),
        ],
        get_world_size(),
    )
    trainer = Trainer(config)
    trainer._resume()
    trainer._open_run()
    phases = Phases()
    for _ in range(WARMUP):
        trainer.train_step()
    with contextlib.ExitStack() as stack:
        instrument(trainer, phases, stack)
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(arguments.steps + 1)]
        torch.cuda.reset_peak_memory_stats()
        for event in starts[:-1]:
            event.record()
            trainer.train_step()
        starts[-1].record()
    parts = {name: statistics.median(times) for name, times in phases.list_ms().items()}
    steps = [a.elapsed_time(b) for a, b in pairwise(starts)]
    result: dict[str, Any] = {
        "step_ms": [statistics.median(steps), min(steps), max(steps)],
        "mean_ms": statistics.mean(steps),
        "parts_ms": parts,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    result |= find_gaps(trainer)
    before = counters["stats"]["unique_graphs"]
    for _ in range(arguments.layouts):
        trainer.train_step()
    result["compiled later"] = counters["stats"]["unique_graphs"] - before if arguments.layouts else None
    trainer._close_run()
    end_processes()
    if int(os.environ.get("RANK", 0)) == 0:
        arguments.result.write_text(json.dumps(result))


def start_worker(variant: str, arguments: argparse.Namespace, corpus: Path) -> dict[str, Any]:
    name = variant.replace(", ", "_").replace(",", "").replace(" ", "_")
    result = arguments.out / f"{name}.json"
    worker = ["-m", "benchmarks.step", str(arguments.out / name), "--worker", "--variant", variant, "--result", str(result)]
    worker += ["--corpus", str(corpus), "--tokens", str(arguments.tokens), "--steps", str(arguments.steps)]
    worker += ["--layouts", str(arguments.layouts)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.gpus}"]
    command = launcher + worker if arguments.gpus > 1 else [sys.executable, *worker]
    (arguments.out / name).mkdir(parents=True, exist_ok=True)
    with (arguments.out / f"{name}.log").open("w") as log:
        done = subprocess.run(command, cwd=REPO, stdout=log, stderr=log)
    if done.returncode:
        print((arguments.out / f"{name}.log").read_text()[-3000:], file=sys.stderr)
        raise SystemExit(f"{variant}: ended with {done.returncode}")
    return json.loads(result.read_text())


def draw(results: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.7 * len(results)), layout="constrained")
    left = [0.0] * len(results)
    for phase in [*PHASES, "rest"]:
        widths = [result["parts_ms"].get(phase, 0.0) for result in results.values()]
        axes.barh(list(results), widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.set_title(title)
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Where the time of a training step goes.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for step.md, step.json and step.png")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens a step and GPU")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each run")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--layouts", type=int, default=0, help="steps over which compilations are counted")
    parser.add_argument("--variants", nargs="+", choices=SETTINGS, default=list(MEASURED))
    for hidden in ("--variant", "--result", "--corpus"):
        parser.add_argument(hidden, type=str if hidden == "--variant" else Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    if arguments.worker:
        run_worker(arguments)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    corpus = arguments.out / "corpus.jsonl"
    total = (WARMUP + arguments.steps + PROFILED + arguments.layouts + 20) * arguments.tokens * arguments.gpus
    write_corpus(corpus, min(total, 40_000_000))
    results = {variant: start_worker(variant, arguments, corpus) for variant in arguments.variants}
    for result in results.values():
        result["parts_ms"]["rest"] = max(0.0, result["step_ms"][0] - sum(result["parts_ms"].values()))
    title = f"{arguments.tokens:,} tokens on each of {arguments.gpus} x {torch.cuda.get_device_name()}, ms a step"
    report = Report(arguments.out / "step.md")
    rows = [["whole step, median [lowest, highest]", *(show_range(r["step_ms"]) for r in results.values())]]
    rows.append(["whole step, mean", *(f"{r['mean_ms']:,.1f}" for r in results.values())])
    rows += [[phase, *(f"{r['parts_ms'].get(phase, 0):,.1f}" for r in results.values())] for phase in [*PHASES, "rest"]]
    rows += [[f"{name}, %", *(f"{100 * r[name]:.2f}" for r in results.values())] for name in ("idle", "exposed communication")]
    rows.append(["peak memory, GiB", *(f"{r['peak_gib']:.1f}" for r in results.values())])
    if arguments.layouts:
        rows.append([f"graphs compiled over {arguments.layouts} steps", *(str(r["compiled later"]) for r in results.values())])
    report.table(title, ["", *results], rows)
    (arguments.out / "step.json").write_text(json.dumps(results, indent=1))
    draw(results, arguments.out / "step.png", title)


def show_range(numbers: list[float]) -> str:
    median, low, high = numbers
    return f"{median:,.1f} [{low:,.1f}, {high:,.1f}]"


if __name__ == "__main__":
    main(sys.argv[1:])
