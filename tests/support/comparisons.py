"""A comparison of made-up runs: its file, and a program in place of the trainer."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flame.compare.outcomes import COMPLETE, Outcome, write_outcome
from flame.compare.runs import Run
from flame.compare.spec import CONFIG_KEY, Budget
from tests.support.paths import REPO

SPEC = """
[compare]
out = "{out}"
seeds = [1, 2, 3]
tokens = 20_000

[tasks.graphs]
config = "{repo}/configs/pathstar_cpu.toml"
model.config = "{repo}/configs/models/pathstar_cpu.json"

[arms.next_token]
objective.name = "next_token"

[arms.mtp]
objective.name = "mtp"

[arms.future]

[metrics.validation_exact_match]
goal = 0.9
"""

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
folder, kind = Path(sys.argv[1]), sys.argv[2]
with (folder / "starts").open("a") as starts:
    starts.write(f"{os.getpid()}\\n")
if kind == "broken":
    print("some words\\nit broke here\\n")
    sys.exit(3)
stops = []
signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
progress, metrics = folder / "progress", folder / "metrics.jsonl"
done = int(progress.read_text()) if progress.exists() else 0
while done < int(sys.argv[3]) and not stops:
    time.sleep(0.02)
    done += 1
    with metrics.open("a") as rows:
        rows.write(json.dumps({"step": done, "validation_exact_match": done / 100}) + "\\n")
    progress.with_name("next").write_text(str(done))
    progress.with_name("next").replace(progress)
sys.exit(75 if done < int(sys.argv[3]) else 0)
"""
"""Instead of a run: counts to a number, keeps its count like a checkpoint, and saves at SIGTERM."""


def write_spec(folder: Path, *, old: str = "", new: str = "") -> str:
    """The path of a comparison of three arms with three seeds, with one text in its file replaced."""
    text = SPEC.format(out=folder / "out", repo=REPO)
    assert old in text
    (folder / "spec.toml").write_text(text.replace(old, new) if old else text)
    return str(folder / "spec.toml")


def make_run(folder: Path, arm: str, length: int, seed: int = 1) -> Run:
    """A run of a task that is as long as its name says."""
    options = {
        CONFIG_KEY: str(REPO / "configs/pathstar_cpu.toml"),
        "model.config": str(REPO / "configs/models/pathstar_cpu.json"),
        "training.seed": seed,
    }
    return Run(str(length), arm, seed, folder / arm / str(seed), options, Budget("tokens", 1000))


def build_stand_in(run: Run) -> list[str]:
    """The command of a stand-in: its kind is the name of the arm, its length that of the task."""
    return [sys.executable, "-S", "-c", STAND_IN, str(run.folder), run.arm, run.task]


def write_result(
    run: Run,
    values: Sequence[float | None],
    *,
    weights: str = "w",
    data: str = "d",
    outcome: Outcome | None = Outcome(COMPLETE),  # noqa: B008
    step_seconds: float = 0.5,
) -> None:
    """What a run of 10 steps between values leaves behind, with 1,000 tokens and 2 TFLOP a step."""
    run.folder.mkdir(parents=True)
    lines = []
    for turn, value in enumerate(values, start=1):
        step = 10 * turn
        costs = {"step_tflops": 2.0, "tokens_seen": 1000 * step, "step_seconds": step_seconds, "peak_memory_gib": 1.5}
        lines += [{"step": step, **costs}, {"step": step, "validation_exact_match": value}]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    first = {"step": 1, "weights": weights, "data": data, "device": "a chip", "world_size": 1}
    (run.folder / "first_step.jsonl").write_text(json.dumps(first) + "\n")
    (run.folder / "starts.jsonl").write_text(json.dumps({"git_revision": "abc"}) + "\n")
    (run.folder / "compare.json").write_text(json.dumps(run.describe()))
    if outcome is not None:
        write_outcome(run.folder, outcome)
