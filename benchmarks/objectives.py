"""What each objective costs at the Llama-3.2-1B shape, beside next token. Prints a table.

    python -m benchmarks.objectives OUT [--only top mtp ...] [--seconds 235]

Each objective of `flame.objectives.registry` has the options that are its defaults, and a process of its own. There, steps of the
trainer with the objective take turns with those of a second model, which trains on the next token alone; AdamW is included.
Documents have a mean length of 1,024 tokens. The processes are spread over the GPUs of the machine.

Times are medians with the range. Memory is the peak that a run would have beyond that of a next-token run: weights and moments of
the objective's modules, and what its loss keeps. "by FLOPs" is the ratio of `flame.models.flops`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.packs import draw_batch
from benchmarks.pool import Job, launch, list_gpus, run_jobs, wait_for_turn
from benchmarks.timing import Timing, measure_in_turns
from benchmarks.training_step import Guard, Rebuilt, TrainingStep, describe_fault, read_step_options
from flame.attention import flash as flash_kernels
from flame.compare.tables import format_table
from flame.config.run import NEXT_TOKEN
from flame.config.schema import Training
from flame.models.causal_lm import load_model_config
from flame.objectives.registry import BUILT_IN
from flame.runtime.distributed import end_processes, set_single_process_defaults, start_processes

MODEL = Path(__file__).parent.parent / "configs" / "models" / "llama_1B.json"
LENGTHS = (16_384, 32_768)
WARMUP, REPEATS = 2, 3
SECONDS = {"fsp_revlm": 75, "mtp": 70, "regret": 70, "top": 65, "nextlat": 65}
"""About how long a process has the GPU. Others take 55."""
COLUMNS = [
    "objective",
    "tokens",
    "ms [low, high]",
    "next token, ms [low, high]",
    "ratio",
    "by FLOPs",
    "TFLOP a step",
    "GiB more",
]

Row = dict[str, Any]


class Comparison:
    """One objective and next token, on the same batches.

    Args:
        longest: tokens of the longest batch.
    """

    def __init__(self, name: str, model: Path, longest: int, mesh: DeviceMesh, compiled: bool):
        self.model_config = load_model_config(str(model))

        def build(objective: str) -> TrainingStep:
            options = read_step_options(model, longest, ["--objective.name", objective], compiled=compiled)
            return TrainingStep(self.model_config, options, mesh)

        self.name = name
        self.sources = {each: Rebuilt(partial(build, each)) for each in (NEXT_TOKEN, name)}

    def measure(self, tokens: int) -> Row:
        """Numbers as JSON keeps them."""
        row: Row = {"objective": self.name, "tokens": tokens}
        batch = draw_batch(tokens, self.model_config.vocab_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        about: dict[str, tuple[float, float]] = {}  # GiB held between steps, and FLOPs

        def ready(name: str, step: TrainingStep) -> Callable[[], None]:
            if name not in about:
                about[name] = step.count_held_gib(), step.count_flops()[1]
            return step.step

        guard = Guard()
        for source in self.sources.values():
            source.take(batch)
            source.get()  # both are there before the first turn, so that each adds its own memory alone
        samplers = {name: guard.watch(name, source, partial(ready, name)) for name, source in self.sources.items()}
        return row | guard.describe(measure_in_turns(samplers, REPEATS, WARMUP), about)


def run_worker(out: Path, name: str) -> None:
    """Measure one objective. Each length's row goes to OUT/NAME.jsonl as it comes."""
    plan = json.loads((out / "plan.json").read_text())
    if not wait_for_turn():
        return
    set_single_process_defaults()
    _, mesh = start_processes(Training(), timeout_seconds=600)
    comparison = Comparison(name, Path(plan["model"]), max(plan["lengths"]), mesh, plan["compiled"])
    fault: str | None = None
    for tokens in plan["lengths"]:
        began = time.perf_counter()
        row: Row = {"objective": name, "tokens": tokens}
        try:
            row = comparison.measure(tokens) if fault is None else row | {name: fault}
        except Exception as error:
            row[name] = describe_fault(error)
        fault = row[name] if isinstance(row[name], str) else None  # what cannot run here cannot run with more tokens
        with (out / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}, {tokens:,} tokens: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    end_processes()


def list_cells(row: Row) -> list[str]:
    """A row of the table."""
    own, plain = row[row["objective"]], row.get(NEXT_TOKEN)
    cells = [row["objective"], f"{row['tokens']:,}", show(own), show(plain)]
    if not (isinstance(own, dict) and isinstance(plain, dict)):
        return [*cells, "-", "-", "-", "-"]
    ratio = own["timing"]["median_ms"] / plain["timing"]["median_ms"]
    numbers = [f"{ratio:.3f}", f"{own['flops'] / plain['flops']:.3f}", f"{own['flops'] / 1e12:,.0f}"]
    return [*cells, *numbers, f"{own['peak_gib'] - plain['peak_gib']:.1f}"]


def show(cell: Row | str | None) -> str:
    if not isinstance(cell, dict):
        return cell or "-"
    return Timing(**cell["timing"]).show() + ("" if cell["is_finite"] else ", a loss that is not finite")


def compare_all(
    names: Sequence[str],
    out: Path,
    gpus: Sequence[str],
    seconds: float,
    title: str,
    *,
    model: Path = MODEL,
    lengths: Sequence[int] = LENGTHS,
    compiled: bool = True,
) -> None:
    """Run a process for each objective, and write objectives.md and objectives.json after each."""
    (out / "plan.json").write_text(json.dumps({"model": str(model), "lengths": list(lengths), "compiled": compiled}))
    notes: dict[str, str] = {}
    jobs = []
    for name in names:
        (out / f"{name}.jsonl").write_text("")
        command = launch(1, "benchmarks.objectives", [str(out), "--worker", name])
        jobs.append(Job(name, 1, command, expected=SECONDS.get(name, 55), waits=True))
    for ended in run_jobs(jobs, gpus, out, seconds):
        print("\n".join([str(ended), *ended.lines]), file=sys.stderr, flush=True)
        if ended.problem is not None:
            notes[ended.job.name] = ended.problem
        rows = [json.loads(line) for name in names for line in (out / f"{name}.jsonl").read_text().splitlines()]
        (out / "objectives.json").write_text(json.dumps(rows, indent=1))
        rows.sort(key=lambda row: row["tokens"])
        lines = [title, "", *format_table(COLUMNS, map(list_cells, rows)), ""]
        lines += [f"- {name}: {problem}" for name, problem in notes.items()]
        (out / "objectives.md").write_text("\n".join(lines).rstrip() + "\n")
    print((out / "objectives.md").read_text(), flush=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="What each objective costs.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for objectives.md, objectives.json and what processes print")
    parser.add_argument("--only", nargs="+", choices=list(BUILT_IN), default=list(BUILT_IN), help="objectives (all)")
    parser.add_argument("--seconds", type=float, default=235.0, help="limit of all (%(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    out: Path = arguments.out.resolve()
    if arguments.worker:
        return run_worker(out, arguments.worker)
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    out.mkdir(parents=True, exist_ok=True)
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {MODEL.stem}, {flash_kernels.describe(64)}"
    compare_all(arguments.only, out, list_gpus(), arguments.seconds, title)


if __name__ == "__main__":
    main(sys.argv[1:])
