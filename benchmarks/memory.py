"""Peak memory of short runs beside what `--estimate` says of them.

    python -m benchmarks.memory OUT

Each run makes three steps on the GPUs of this machine, on the Python standard library as bytes. Runs that need more GPUs than
there are, or more memory, are left out. Several run at once, on GPUs of their own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.pool import Job, launch, list_gpus, run_jobs
from benchmarks.shapes import write_shape
from flame.compare.tables import format_table
from flame.logging.plots import read_metrics
from flame.trainer.estimate import GIB, SPARE, estimate_run
from flame.trainer.options import read_options

STEPS = 3


class Case(NamedTuple):
    """One run."""

    shape: str
    tokens: int
    gpus: int
    objective: str = "next_token"
    compiled: bool = True
    recompute: str = "none"

    @property
    def name(self) -> str:
        return "-".join(str(part) for part in self)


CASES = [
    Case("340M", 32_768, 1),
    Case("340M", 32_768, 1, "future"),
    Case("340M", 16_384, 1, compiled=False),
    Case("340M", 32_768, 1, recompute="selective"),
    Case("340M", 32_768, 1, recompute="full"),
    Case("340M", 32_768, 1, recompute="pointwise"),
    Case("340M", 16_384, 1, "mtp"),
    Case("1B", 16_384, 1),
    Case("1B", 65_536, 1, "future"),
    Case("1B", 16_384, 1, compiled=False),
    Case("1B", 32_768, 1, recompute="selective"),
    Case("1B", 32_768, 1, recompute="full"),
    Case("1B", 65_536, 1, "future", recompute="pointwise"),
    Case("1B", 16_384, 2),
    Case("1B", 65_536, 2, "future"),
    Case("8B", 4_096, 2, "future"),
    Case("8B", 16_384, 2, recompute="full"),
    Case("8B", 16_384, 4, "future"),
]


def list_options(case: Case, out: Path) -> list[str]:
    values: dict[str, object] = {
        "job.dump_folder": out / case.name,
        "model.config": write_shape(case.shape, out),
        "model.tokenizer_path": "bytes",
        "training.dataset": "stdlib",
        "training.seq_len": case.tokens,
        "training.context_len": 4096,
        "training.steps": STEPS,
        "training.compile": str(case.compiled).lower(),
        "lr_scheduler.warmup_steps": 1,
        "activation_checkpoint.mode": case.recompute,
        "objective.name": case.objective,
        "checkpoint.enable_checkpoint": "false",
        "metrics.log_freq": 1,
        "metrics.diagnostics_interval": 0,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def read_peaks(run: Path) -> tuple[float, float]:
    """GiB, of a run that is through: of all its steps, and of those after the first, which compiles."""
    peaks = [peak for row in read_metrics(run) if (peak := row["peak_memory_gib"]) is not None]
    return max(peaks), max(peaks[1:])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measured peak memory beside the estimate.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=[case.name for case in CASES], help="names of cases")
    parser.add_argument("--seconds", type=int, default=200, help="limit of one run")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    out = arguments.out.absolute()  # runs start in the repository's folder
    gpus = list_gpus()
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    estimates = {
        case: estimate_run(read_options(list_options(case, out), case.gpus)).peak / GIB
        for case in CASES
        if case.gpus <= len(gpus) and (not arguments.only or case.name in arguments.only)
    }
    cases = {case.name: case for case, peak in estimates.items() if peak < SPARE * memory}
    jobs = [
        Job(name, case.gpus, launch(case.gpus, "flame.train", list_options(case, out)), arguments.seconds)
        for name, case in cases.items()
    ]
    columns = ["Llama", "tokens a GPU", "GPUs", "objective", "compiled", "recomputed", "estimate, GiB", "measured, GiB", "ratio"]
    columns.append("after the first step, GiB")
    print("\n".join(format_table(columns, [])))
    for ended in run_jobs(jobs, gpus, out):
        case = cases[ended.job.name]
        cells = [case.shape, f"{case.tokens:,}", str(case.gpus), case.objective, "yes" if case.compiled else "no", case.recompute]
        if ended.problem:
            found = [ended.problem, "-", "-"]
        else:
            peak, later = read_peaks(out / case.name)
            found = [f"{peak:.1f}", f"{estimates[case] / peak:.3f}", f"{later:.1f}"]
        print(f"| {' | '.join([*cells, f'{estimates[case]:.1f}', *found])} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
