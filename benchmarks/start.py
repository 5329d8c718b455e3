"""Seconds from the command to the first step: the first start on a machine, which compiles, and later ones. Prints a table.

    python -m benchmarks.start OUT [--shape 1B] [--tokens 16384] [--starts 3] [--options --training.cuda_graphs false ...]

Each start is `train.sh` on one GPU with `training.compile`. Compiled code is kept under OUT/compiled, which the first start finds
empty; runs of your own keep theirs where torch and triton do (docs/performance.md). "first line" is when the run has opened its
inputs and built its model, "first step" when step 1 is in its metrics.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.packs import write_corpus
from benchmarks.pool import REPO
from benchmarks.shapes import SHAPES, write_shape
from benchmarks.step_worker import list_options
from benchmarks.timing import Report

CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Variables that say where compiled code is kept, and folders under OUT/compiled."""
POLL = 0.05
CHARACTERS = 2_000_000


class Start(NamedTuple):
    """Seconds since the command."""

    first_line: float
    first_step: float


def measure_start(command: Sequence[str], metrics: Path, variables: Mapping[str, str], log: Path) -> Start:
    """Start a run, and end it when its first step is in its metrics.

    Raises:
        SystemExit: the run has ended without one.
    """
    metrics.unlink(missing_ok=True)
    began = time.perf_counter()
    first_line = 0.0
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=REPO, env=os.environ | variables)
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None and not metrics.exists():
                    raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}: see {log}")
                if not first_line and log.stat().st_size:
                    first_line = time.perf_counter() - began
                time.sleep(POLL)
            return Start(first_line, time.perf_counter() - began)
        finally:
            process.terminate()
            process.wait()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Seconds from the command to the first step.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for start.md, logs and compiled code")
    parser.add_argument("--shape", choices=SHAPES, default="1B", help="of the model (%(default)s)")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a step (%(default)s)")
    parser.add_argument("--starts", type=int, default=3, help="one after the other (%(default)s)")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of the run, last")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out.resolve()
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "compiled", ignore_errors=True)
    corpus, model = out / "corpus.jsonl", write_shape(arguments.shape, out)
    write_corpus(corpus, CHARACTERS)
    variables = {name: str(out / "compiled" / folder) for name, folder in CACHES.items()} | {
        "NGPU": "1",
        "PYTHON": sys.executable,
    }
    rows = []
    for number in range(1, arguments.starts + 1):
        run = out / f"run-{number}"
        options = list_options(run, model, corpus, arguments.tokens, ["--metrics.log_freq", "1", *arguments.options])
        found = measure_start(["bash", "train.sh", *options], run / "metrics.jsonl", variables, out / f"start-{number}.log")
        rows.append([str(number), f"{found.first_line:.1f}", f"{found.first_step:.1f}"])
        print(rows[-1], file=sys.stderr, flush=True)
    report = Report(out / "start.md")
    report.write(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Llama {arguments.shape}, {os.cpu_count()} CPU cores"
    )
    report.table("Seconds from the command", ["start", "first line", "first step"], rows)


if __name__ == "__main__":
    main(sys.argv[1:])
