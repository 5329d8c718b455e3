"""Time and memory of the converters, on a model with random weights and the CPU: in, and out again. Prints a table.

    python -m benchmarks.convert OUT [--config configs/models/llama_1B.json] [--folder /tmp]

Each conversion is a process of its own, as on the command line: the seconds and the peak are the whole process's, with its
imports. The peak is its largest resident set, to which pages of files count that it has mapped. About four times the model's
float32 weights are needed on the disk. The check has the weights once in memory, and once mapped, as pages that can be dropped.

The second table is checkpoint.initial_load_path: two processes that hold half the model each, and the memory of their own that
loading takes beyond that, pages of files not counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from benchmarks.timing import Report

REPO = Path(__file__).parent.parent

BUILD = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from flame.data.tokenizer import build_bytes_tokenizer
torch.manual_seed(0)
AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]), dtype=torch.float32).save_pretrained(sys.argv[2])
build_bytes_tokenizer().save_pretrained(sys.argv[2])
"""

LOAD = """
import sys, threading, time
import torch.distributed as dist
from flame.runtime.distributed import start_processes
from flame.weights.load import load_hf_weights
from flame.weights.source import find_weights
from flame.config.schema import JobConfig, ObjectiveChoice
from flame.models.causal_lm import load_model_config
from flame.trainer.setup import build_model

def read_anonymous_gib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 2**20

config = JobConfig(objective=ObjectiveChoice(name="future"))
device, mesh = start_processes(config.training, config.comm.timeout_seconds)
model = build_model(config, load_model_config(sys.argv[1]), device, mesh)
before, peak, done = read_anonymous_gib(), 0.0, False

def watch():
    global peak
    while not done:
        peak = max(peak, read_anonymous_gib())
        time.sleep(0.01)

watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
load_hf_weights(model, find_weights(sys.argv[1]))
seconds = time.perf_counter() - start
done = True
watcher.join()
print(f"{dist.get_rank()} {seconds:.1f} {before:.2f} {peak - before:.2f}")
dist.destroy_process_group()
"""


class Cost(NamedTuple):
    """Of one process."""

    seconds: float
    peak_gib: float


def run(*command: str) -> Cost:
    """Run a Python command line to its end.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return Cost(time.perf_counter() - start, usage.ru_maxrss / 2**20)


def count_gib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30


def measure(config: Path, folder: Path, report: Report) -> None:
    """Convert a model of a configuration in and out, within a folder."""
    source, checkpoint, out = folder / "source", folder / "step-0", folder / "out"
    run("-c", BUILD, str(config), str(source))
    to_dcp = ("-m", "flame.cli.convert_hf_to_dcp", "--model", str(source), "--out", str(checkpoint))
    to_hf = ("-m", "flame.cli.convert_dcp_to_hf", "--checkpoint", str(checkpoint), "--out", str(out))
    rows = []
    for name, command, written in (
        ("imports alone", ("-c", "import flame.cli.convert_dcp_to_hf"), None),
        ("in", to_dcp, checkpoint),
        ("out, float32, not checked", (*to_hf, "--skip_check"), out),
        ("out, float32", to_hf, out),
        ("out, bfloat16", (*to_hf, "--dtype", "bfloat16"), out),
    ):
        cost = run(*command)
        size = f"{count_gib(written):.2f}" if written else ""
        rows.append([name, f"{cost.seconds:.1f}", f"{cost.peak_gib:.2f}", size])
    title = (
        f"{config.name}, torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    )
    report.table(title, ["conversion", "seconds", "peak GiB", "GiB written"], rows)
    script = folder / "load.py"
    script.write_text(LOAD)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(source)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(launcher, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    rows = sorted(line.split() for line in done.stdout.splitlines())
    report.table("into a sharded model", ["process", "seconds", "GiB held before", "GiB more at most"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, default=Path("configs/models/llama_1B.json"))
    parser.add_argument("--folder", type=Path, default=None, help="disk to work on; the system's temporary folder if not given")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=arguments.folder))
    try:
        measure(arguments.config, folder, Report(arguments.out / "convert.md"))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
