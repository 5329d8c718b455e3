"""What a step costs as it grows: with its tokens, with the length of documents, with the model. Tables, and OUT/growth.png.

    python -m benchmarks.growth OUT [--parts tokens documents models] [--seconds 235]

Steps of the trainer (`benchmarks.training_step`), AdamW included, at the Llama-3.2-1B shape: next token, the exact future loss,
and the cheap setting of `benchmarks.settings`. They take turns, step by step, on one model in one process. Documents have a mean
length of 1,024 tokens where nothing else is said, and lengths of the exponential distribution up to four times their mean.
Part "recomputed" has more tokens than fit otherwise, with all activations recomputed.

Each part and model is a process; they are spread over the GPUs of the machine, and follow one another on each. Times are medians
with the range. Peak memory is what a run of that kind alone would need, without the allocator's reserve. "by FLOPs" is the ratio
of `flame.models.flops`. What the seconds do not suffice for is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.growth_report import draw, write_tables
from benchmarks.packs import LONGEST, MEAN_LENGTH, draw_batch, draw_cu_seqlens
from benchmarks.pool import Job, launch, list_gpus, run_jobs, wait_for_turn
from benchmarks.settings import SETTINGS
from benchmarks.timing import measure_in_turns
from benchmarks.training_step import (
    OUT_OF_MEMORY,
    Guard,
    Rebuilt,
    TrainingStep,
    describe_fault,
    free_memory,
    launch_for,
    read_step_options,
)
from flame.attention import flash as flash_kernels
from flame.config.schema import Training
from flame.models.causal_lm import load_model_config
from flame.objectives.registry import choose_objective
from flame.runtime.distributed import end_processes, set_single_process_defaults, start_processes

MODELS = Path(__file__).parent.parent / "configs" / "models"
NEXT_TOKEN, FUTURE, CHEAP = "next token", "future", "first 4 layers, 8,192 anchors"
MOST_SEEDS = 500
NO_TIME = "no time was left"
GRACE = 10.0
"""Seconds that a point may go on after the deadline."""


@dataclass(frozen=True)
class Point:
    """One batch that the three steps are measured on."""

    part: str
    model: str
    tokens: int
    mean_length: int = MEAN_LENGTH
    """Of documents."""
    recompute: str = "none"

    @property
    def longest(self) -> int:
        return min(self.tokens, self.mean_length * LONGEST // MEAN_LENGTH)


@dataclass
class Plan:
    """What one process measures."""

    name: str
    model_config: str
    points: list[Point]
    seconds: float
    """About how long it takes on an H200."""
    compiled: bool = True
    deadline: float = field(default=float("inf"))
    """`time.time()` after which no point begins."""

    def write(self, folder: Path) -> None:
        (folder / f"{self.name}.plan.json").write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(folder: Path, name: str) -> Plan:
        values = json.loads((folder / f"{name}.plan.json").read_text())
        return Plan(**values | {"points": [Point(**point) for point in values["points"]]})


def list_plans(out: Path, parts: Sequence[str]) -> list[Plan]:
    """The processes of these parts. Their longest points come last."""
    big = str(MODELS / "llama_1B.json")
    lengths = [4096 << power for power in range(7)]
    means = [128, 512, 2048, 8192, 32_768, 65_536]
    plans = {
        "tokens": [Plan("tokens", big, [Point("tokens", "1B", tokens) for tokens in lengths], 120)],
        "documents": [Plan("documents", big, [Point("documents", "1B", 65_536, mean) for mean in means], 130)],
        "models": [
            Plan(f"models-{name}", path, [Point("models", name, 16_384)], 35)
            for name, path in {
                "15M": str(MODELS / "llama_15M.json"),
                "125M": str(MODELS / "llama_125M.json"),
                "340M": str(MODELS / "llama_340M.json"),
                "1B": big,
            }.items()
            if name != "1B" or "tokens" not in parts  # which has that point
        ],
        "recomputed": [
            Plan("recomputed", big, [Point("recomputed", "1B", tokens, recompute="full") for tokens in lengths[4:]], 150)
        ],
    }
    return [plan for part in parts for plan in plans[part]]


PARTS = ("tokens", "documents", "models", "recomputed")


def find_seed(point: Point) -> int:
    """The first seed of a layout with as many documents as the mean length says, or nearly: few long ones vary much."""
    wanted = round(point.tokens / point.mean_length)

    def miss(seed: int) -> int:
        return abs(len(draw_cu_seqlens(point.tokens, point.mean_length, point.longest, seed)) - 1 - wanted)

    exact = next((seed for seed in range(MOST_SEEDS) if not miss(seed)), None)
    return min(range(MOST_SEEDS), key=miss) if exact is None else exact


# ---------------------------------------------------------------- in one process


class Worker:
    """Measures the points of one model, one after another."""

    def __init__(self, plan: Plan, mesh: DeviceMesh):
        self.plan, self.mesh = plan, mesh
        self.model_config = load_model_config(plan.model_config)
        self._source: Rebuilt | None = None
        self._recompute = ""
        self._too_many: dict[str, int] = {}  # recompute -> tokens for which memory ran out in a next-token step

    def measure(self, point: Point) -> dict[str, Any]:
        """Its numbers, as JSON keeps them: fields of `Point`, documents, and by setting the numbers or why there are none."""
        found: dict[str, Any] = asdict(point)
        if time.time() > self.plan.deadline:
            return found | {"cells": dict.fromkeys((NEXT_TOKEN, FUTURE, CHEAP), NO_TIME)}
        if point.tokens > self._too_many.get(point.recompute, point.tokens):
            return found | {"cells": dict.fromkeys((NEXT_TOKEN, FUTURE, CHEAP), OUT_OF_MEMORY)}
        seed = find_seed(point) if point.part == "documents" else 0
        mean, longest = point.mean_length, point.longest
        batch = draw_batch(point.tokens, self.model_config.vocab_size, seed, mean=mean, longest=longest)
        found["documents"] = len(batch.cu_seqlens) - 1
        source = self._prepare(point)
        source.take(batch)
        with launch_for(point.longest):
            found["cells"] = self._measure_settings(source, point)
        if found["cells"][NEXT_TOKEN] == OUT_OF_MEMORY:
            self._too_many[point.recompute] = point.tokens
        return found

    def _prepare(self, point: Point) -> Rebuilt:
        if self._source is None or self._recompute != point.recompute:
            if self._source is not None:
                self._source.drop()
                free_memory()
            self._recompute = point.recompute
            self._source = Rebuilt(partial(self._build, point.recompute))
        elif torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._source

    def _read(self, setting: str, recompute: str):
        tokens = max(point.tokens for point in self.plan.points)
        return read_step_options(
            Path(self.plan.model_config), tokens, SETTINGS[setting], compiled=self.plan.compiled, recompute=recompute
        )

    def _build(self, recompute: str) -> TrainingStep:
        return TrainingStep(self.model_config, self._read(FUTURE, recompute), self.mesh)

    def _measure_settings(self, source: Rebuilt, point: Point) -> dict[str, Any]:
        configs = {name: self._read(name, point.recompute) for name in (FUTURE, CHEAP)}
        options = {name: config.get(choose_objective(config).options) for name, config in configs.items()}  # type: ignore[union-attr]
        about: dict[str, tuple[float, float]] = {}  # GiB held between steps, and FLOPs

        def ready(name: str, step: TrainingStep) -> Callable[[], None]:
            if name in options:
                step.choose(options[name])
            if name not in about:
                about[name] = step.count_held_gib(name in options), step.count_flops()[name in options]
            return partial(step.step, name in options)

        guard = Guard()
        samplers = {
            name: guard.watch(name, source, partial(ready, name), None if name == NEXT_TOKEN else NEXT_TOKEN)
            for name in (NEXT_TOKEN, FUTURE, CHEAP)
        }
        warmup = 2 if point.tokens < 65_536 else 1  # longer steps vary less
        return guard.describe(measure_in_turns(samplers, 3, warmup), about)


def run_worker(out: Path, name: str) -> None:
    """Measure a plan's points. Each goes to OUT/NAME.jsonl as it comes."""
    plan = Plan.read(out, name)
    results = out / f"{name}.jsonl"
    results.write_text("")
    if not wait_for_turn():
        return
    set_single_process_defaults()
    _, mesh = start_processes(Training(), timeout_seconds=600)
    worker = Worker(plan, mesh)
    for point in plan.points:
        began = time.perf_counter()
        try:
            found = worker.measure(point)
        except Exception as error:
            found = asdict(point) | {"cells": dict.fromkeys((NEXT_TOKEN, FUTURE, CHEAP), describe_fault(error))}
        with results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{point}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    end_processes()


# ---------------------------------------------------------------- the command


def read_results(out: Path, plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """What has been measured so far. The 1B model's row of part "models" is one of part "tokens"."""
    found = []
    for plan in plans:
        path = out / f"{plan.name}.jsonl"
        found += [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    has_models = any(point.part == "models" for plan in plans for point in plan.points)
    shared = [row | {"part": "models"} for row in found if row["part"] == "tokens" and row["tokens"] == 16_384 and has_models]
    return found + shared


def measure_plans(plans: Sequence[Plan], out: Path, gpus: Sequence[str], seconds: float, title: str) -> None:
    """Run the plans, and write growth.md, growth.json and growth.png after each."""
    began = time.time()
    notes: list[str] = []
    for plan in plans:
        plan.deadline = began + seconds
        plan.write(out)
        (out / f"{plan.name}.jsonl").write_text("")

    jobs = [
        Job(plan.name, 1, launch(1, "benchmarks.growth", [str(out), "--worker", plan.name]), expected=plan.seconds, waits=True)
        for plan in plans
    ]
    for ended in run_jobs(jobs, gpus, out, seconds + GRACE):
        print("\n".join([str(ended), *ended.lines]), file=sys.stderr, flush=True)
        if ended.problem is not None:
            notes.append(f"{ended.job.name}: {ended.problem}")
        rows = read_results(out, plans)
        (out / "growth.json").write_text(json.dumps(rows, indent=1))
        write_tables(rows, notes, title, out / "growth.md")
    print((out / "growth.md").read_text(), flush=True)
    draw(read_results(out, plans), out / "growth.png", title)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="What a step costs as it grows.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for growth.md, growth.json, growth.png and what processes print")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:3], help="what grows (%(default)s)")
    parser.add_argument("--seconds", type=float, default=235.0, help="after which no more is begun (%(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    out: Path = arguments.out.resolve()
    if arguments.worker:
        return run_worker(out, arguments.worker)
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    out.mkdir(parents=True, exist_ok=True)
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {flash_kernels.describe(64)}"
    measure_plans(list_plans(out, arguments.parts), out, list_gpus(), arguments.seconds, title)


if __name__ == "__main__":
    main(sys.argv[1:])
