"""Peak memory of short runs beside what `--estimate` says of them.

    python -m benchmarks.memory OUT

Each run makes three steps on the GPUs of this machine, on the Python standard library as bytes. Runs that need more GPUs than
there are, or more memory, are left out. Runs of one GPU are spread over all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

import torch

from benchmarks.faults import REPO
from benchmarks.spread import list_gpus
from flame.compare.tables import format_table
from flame.runtime.json_lines import parse_line
from flame.trainer.estimate import GIB, SPARE, estimate_run
from flame.trainer.options import read_options

STEPS = 3
SHAPES: dict[str, dict[str, object]] = {
    "340M": {},
    "1B": {},
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
FILES = {"340M": "llama_340M.json", "1B": "llama_1B.json", "8B": "llama_1B.json"}


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
    shape = out / f"{case.shape}.json"
    shape.write_text(json.dumps(json.loads((REPO / "configs/models" / FILES[case.shape]).read_text()) | SHAPES[case.shape]))
    values: dict[str, object] = {
        "job.dump_folder": out / case.name,
        "model.config": shape,
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


def measure(case: Case, out: Path, gpus: list[str], seconds: int) -> float | None:
    """GiB at the peak of a run; None if it fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.gpus}"]
    command = [*torchrun, "-m", "flame.train", *list_options(case, out)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    with (out / f"{case.name}.log").open("w") as log:
        try:
            subprocess.run(command, cwd=REPO, env=environment, stdout=log, stderr=log, timeout=seconds, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return None
    rows = map(parse_line, (out / case.name / "metrics.jsonl").read_bytes().splitlines(keepends=True))
    return max(row["peak_memory_gib"] for row in rows if row is not None)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measured peak memory beside the estimate.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="names of cases")
    parser.add_argument("--seconds", type=int, default=200, help="limit of one run")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    gpus = list_gpus()
    count = len(gpus)
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    estimates = {
        case: estimate_run(read_options(list_options(case, arguments.out), case.gpus)).peak / GIB
        for case in CASES
        if case.gpus <= count and (not arguments.only or case.name in arguments.only)
    }
    cases = [case for case, peak in estimates.items() if peak < SPARE * memory]
    free: Queue[str] = Queue()
    for gpu in gpus:
        free.put(gpu)
    small = [case for case in cases if case.gpus == 1]

    def run_small(case: Case) -> float | None:
        gpu = free.get()
        try:
            return measure(case, arguments.out, [gpu], arguments.seconds)
        finally:
            free.put(gpu)

    def show(case: Case, peak: float | None) -> None:
        cells = [case.shape, f"{case.tokens:,}", str(case.gpus), case.objective, "yes" if case.compiled else "no", case.recompute]
        found = ["failed", "-"] if peak is None else [f"{peak:.1f}", f"{estimates[case] / peak:.3f}"]
        print(f"| {' | '.join([*cells, f'{estimates[case]:.1f}', *found])} |", flush=True)

    columns = ["Llama", "tokens a GPU", "GPUs", "objective", "compiled", "recomputed", "estimate, GiB", "measured, GiB", "ratio"]
    print("\n".join(format_table(columns, [])))
    with ThreadPoolExecutor(count) as pool:
        for case, peak in zip(small, pool.map(run_small, small), strict=True):
            show(case, peak)
    for case in cases:
        if case.gpus > 1:
            show(case, measure(case, arguments.out, gpus[: case.gpus], arguments.seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
