"""What a run survives: kills, requests to stop, damaged checkpoints, a full disk, changed files. Prints tables.

    python -m benchmarks.faults OUT [--kills 30] [--ranks 2] [further options of the runs]

A toy model on the Python standard library. One run goes through uninterrupted; others, with the same options, meet faults at
random moments and are started again with the same command until they are done. Then losses and gradient norms of all steps and
the final weights are compared with the uninterrupted run's, bit by bit. `--only files` is `fault_files`, in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.fault_files import run_files
from benchmarks.pool import REPO
from flame.checkpoints.manager import list_checkpoints
from flame.logging.plots import read_metrics
from flame.weights.tensors import read_model_tensors

COMPARED = ("loss", "ce_loss", "aux_loss", "grad_norm", "lr", "tokens_seen")
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
OPTIONS = {
    "model.tokenizer_path": "bytes",
    "training.seq_len": 512,
    "training.context_len": 256,
    "training.gradient_accumulation_steps": 2,
    "training.num_streams": 24,
    "training.num_workers": 1,
    "objective.name": "future",
    "future_predictor.dropout": 0.1,
    "metrics.log_freq": 1,
    "checkpoint.interval": 5,
    "checkpoint.export_hf": "false",
}


@dataclass
class Outcome:
    """What became of one faulty run."""

    fault: str
    times: int = 0
    steps_redone: int = 0
    exit_codes: dict[int, int] = field(default_factory=dict)
    differing_steps: int = 0
    largest_difference: float = 0.0
    weights_equal: bool = False

    def add(self, other: Outcome) -> None:
        self.times += other.times
        self.steps_redone += other.steps_redone
        for code, count in other.exit_codes.items():
            self.exit_codes[code] = self.exit_codes.get(code, 0) + count
        self.differing_steps += other.differing_steps
        self.largest_difference = max(self.largest_difference, other.largest_difference)
        self.weights_equal &= other.weights_equal

    def show(self) -> str:
        codes = ", ".join(f"{code} x {count}" for code, count in sorted(self.exit_codes.items()))
        different = f"{self.differing_steps} steps differ, by up to {self.largest_difference:.1e}"
        losses = different if self.differing_steps else "bit-equal"
        weights = "bit-equal" if self.weights_equal else "differ"
        return f"| {self.fault} | {self.times} | {codes} | {self.steps_redone} | {losses} | {weights} |"


@dataclass
class Bench:
    """Starts runs of one set of options, and disturbs them."""

    out: Path
    ranks: int
    steps: int
    extra: list[str]
    chooser: random.Random
    changes: dict[str, object] = field(default_factory=dict)
    """To `OPTIONS`."""

    def start(self, run: Path) -> subprocess.Popen[bytes]:
        options = [part for key, value in (OPTIONS | self.changes).items() for part in (f"--{key}", str(value))]
        options += ["--model.config", str(self.out / "model.json"), "--training.steps", str(self.steps)]
        options += ["--job.dump_folder", str(run), *self.extra]
        environment = os.environ | {"NGPU": str(self.ranks), "PYTHON": sys.executable}
        log = (self.out / f"{run.name}.log").open("ab")
        command = ["bash", str(REPO / "train.sh"), *options]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def finish(self, run: Path) -> int:
        return self.start(run).wait()

    def disturb(self, run: Path, times: int, strike: Callable[[subprocess.Popen[bytes]], None], fault: str) -> Outcome:
        """Start the run again and again; strike at a random moment each time, `times` times, then let it end."""
        outcome = Outcome(fault)
        while outcome.times < times:
            starts_before = len(read_lines(run / "starts.jsonl"))
            process = self.start(run)
            if self.chooser.random() > 0.2:  # else somewhere in its start
                wait_for_step(process, run, starts_before)
                time.sleep(self.chooser.uniform(0.0, 3.0))
            else:
                time.sleep(self.chooser.uniform(0.0, 10.0))
            if process.poll() is None:
                strike(process)
                outcome.times += 1
            code = process.wait()
            outcome.exit_codes[code] = outcome.exit_codes.get(code, 0) + 1
            steps_done = count_steps(run)
            saved = [int(path.name.removeprefix("step-")) for path in list_checkpoints(run / "checkpoint")]
            outcome.steps_redone += steps_done - max(saved, default=0)
            if code == 0:
                break
            print(f"{fault}: {outcome.times} of {times}, exit code {code}, at step {steps_done} of {self.steps}", file=sys.stderr)
        assert self.finish(run) == 0, f"see {self.out}/{run.name}.log"
        return outcome


def wait_for_step(process: subprocess.Popen[bytes], run: Path, starts_before: int, least: int = 0) -> None:
    """Until this start has made a step, and has come to step `least`, or has ended."""
    while process.poll() is None:
        starts = read_lines(run / "starts.jsonl")
        if len(starts) > starts_before and count_steps(run) > max(starts[-1]["start_step"], least - 1):
            return
        time.sleep(0.05)


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a JSON-lines file that may be being written."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def count_steps(run: Path) -> int:
    return max((row["step"] for row in read_lines(run / "metrics.jsonl")), default=0)


def find_workers(launcher: int) -> list[int]:
    """Training processes below a launcher."""
    workers = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = (path.parent / "cmdline").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == launcher and b"flame.train" in command:
            workers.append(int(path.parent.name))
    return workers


def kill_all(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def send_signal(which: signal.Signals, process: subprocess.Popen[bytes]) -> None:
    process.send_signal(which)


def find_differences(found: dict, expected: dict) -> dict[str, float]:
    """How far two rows of metrics of one step are apart, by name."""
    return {name: abs(expected[name] - found[name]) for name in COMPARED if expected.get(name) is not None}


def read_steps(run: Path) -> dict[int, dict[str, Any]]:
    """Rows of metrics by step."""
    rows: list[dict[str, Any]] = read_metrics(run)
    return {row["step"]: row for row in rows}


def compare(outcome: Outcome, run: Path, reference: Path) -> Outcome:
    """Fill in how the run differs from the uninterrupted one."""
    found, expected = read_steps(run), read_steps(reference)
    assert found.keys() == expected.keys(), f"steps {sorted(found.keys() ^ expected.keys())} are logged by one run only"
    for step, row in expected.items():
        differences = find_differences(found[step], row)
        outcome.differing_steps += any(differences.values())
        outcome.largest_difference = max(outcome.largest_difference, *differences.values())
    one, other = (read_model_tensors(list_checkpoints(folder / "checkpoint")[-1]) for folder in (run, reference))
    outcome.weights_equal = all(torch.equal(one[name], other[name]) for name in other)
    return outcome


def run_kills(bench: Bench, reference: Path, kills: int) -> Iterator[Outcome]:
    def kill_any(process: subprocess.Popen[bytes]) -> None:
        workers = find_workers(process.pid)
        if workers and bench.chooser.random() < 0.5:
            os.kill(bench.chooser.choice(workers), signal.SIGKILL)
        else:
            kill_all(process)

    total = Outcome("kill -9 of one rank or all", weights_equal=True)
    runs = 0
    while total.times < kills:  # a run that is through before is followed by another
        runs += 1
        run = bench.out / f"killed_{runs}"
        total.add(compare(bench.disturb(run, kills - total.times, kill_any, total.fault), run, reference))
    total.fault += f", {runs} run{'s' if runs > 1 else ''}"
    yield total


def run_signals(bench: Bench, reference: Path, times: int) -> Iterator[Outcome]:
    for stop in (signal.SIGTERM, signal.SIGUSR1):
        run = bench.out / stop.name
        outcome = bench.disturb(run, times, partial(send_signal, stop), f"{stop.name} to the launcher")
        yield compare(outcome, run, reference)


def damage_shard(folder: Path) -> None:
    shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def remove_shard(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def garble_index(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"garbage")


def tear_state(folder: Path) -> None:
    state = folder / "trainer.json"
    state.write_bytes(state.read_bytes()[:100])


def run_damages(bench: Bench, reference: Path) -> Iterator[Outcome]:
    """The newest checkpoint of a finished run is damaged: the one before it is used, and the last steps are made again."""
    damages = {
        "truncated shard": damage_shard,
        "missing shard": remove_shard,
        "garbage for index": garble_index,
        "torn trainer.json": tear_state,
    }
    for name, damage in damages.items():
        run = bench.out / name.replace(" ", "_")
        shutil.copytree(reference, run)
        damage(list_checkpoints(run / "checkpoint")[-1])
        outcome = Outcome(f"newest checkpoint: {name}", 1)
        saved = int(list_checkpoints(reference / "checkpoint")[-2].name.removeprefix("step-"))
        code = bench.finish(run)
        outcome.exit_codes[code] = 1
        outcome.steps_redone = bench.steps - saved
        yield compare(outcome, run, reference)


def run_full_disk(bench: Bench, reference: Path) -> Iterator[Outcome]:
    """On a file system that holds one checkpoint and not two: refused before writing, then gone on with more room. Needs root."""
    run = bench.out / "full_disk"
    run.mkdir()
    size = sum(path.stat().st_size for path in list_checkpoints(reference / "checkpoint")[-1].rglob("*"))
    bucket = 18 * 2**20 + 5 * size  # three checkpoints are there while one is being replaced
    mount = ["mount", "-t", "tmpfs", "-o", f"size={bucket}", "tmpfs", str(run)]
    if subprocess.run(mount, capture_output=True).returncode:
        print("full disk: left out, mounting a small file system is not allowed here", file=sys.stderr)
        return
    try:
        outcome = Outcome("disk full at a save", 1)
        filler = run / "filler"
        process = bench.start(run)
        while count_steps(run) < 7 and process.poll() is None:
            time.sleep(0.02)
        free = shutil.disk_usage(run).free
        filler.write_bytes(bytes(max(0, free - 2**20)))
        first = process.wait()
        outcome.exit_codes[first] = 1
        kept = [path.name for path in list_checkpoints(run / "checkpoint")]
        print(f"full disk: exit code {first}, checkpoints kept: {kept}", file=sys.stderr)
        outcome.steps_redone = count_steps(run) - int(kept[-1].removeprefix("step-"))
        filler.unlink()
        assert bench.finish(run) == 0, f"see {bench.out}/full_disk.log"
        yield compare(outcome, run, reference)
    finally:
        subprocess.run(["umount", "-l", str(run)], check=False)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="What a run survives.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="empty folder for the runs")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--signals", type=int, default=5, help="of each kind")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("kills", "signals", "damages", "disk", "files"), help="one kind of fault")
    known, extra = parser.parse_known_args(argv)
    is_lossless = True
    if known.only in (None, "files"):
        is_lossless = run_files(known.out / "files", MODEL | {"rope_parameters": ROPE, "rms_norm_eps": 1e-6}, OPTIONS, known.seed)
    if known.only == "files":
        return int(not is_lossless)
    known.out.mkdir(parents=True, exist_ok=True)
    (known.out / "model.json").write_text(json.dumps(MODEL))
    bench = Bench(known.out, known.ranks, known.steps, extra, random.Random(known.seed))
    reference = known.out / "uninterrupted"
    assert bench.finish(reference) == 0, f"see {known.out}/uninterrupted.log"
    kinds: dict[str, Callable[[], Iterator[Outcome]]] = {
        "kills": lambda: run_kills(bench, reference, known.kills),
        "signals": lambda: run_signals(bench, reference, known.signals),
        "damages": lambda: run_damages(bench, reference),
        "disk": lambda: run_full_disk(bench, reference),
    }
    print(f"{known.steps} steps on {known.ranks} processes, a checkpoint every {OPTIONS['checkpoint.interval']} steps")
    print("| fault | times | exit codes | steps made again | losses of all steps | final weights |")
    print("|---|---|---|---|---|---|")
    for outcome in (outcome for kind, run in kinds.items() if known.only in (None, kind) for outcome in run()):
        print(outcome.show(), flush=True)
        is_lossless &= not outcome.differing_steps and outcome.weights_equal
    return int(not is_lossless)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
