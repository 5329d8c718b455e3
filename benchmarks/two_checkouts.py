"""Steps of the trainer in two checkouts, side by side: has a change made training slower? Prints a table.

    python -m benchmarks.two_checkouts OUT --other ../before [--model llama_340M] [--tokens 65536] [--rounds 3]
    python -m benchmarks.two_checkouts OUT --other ../before --config configs/quickstart.toml

The first is for a GPU. The second trains what the file says, also on a CPU.
Whole runs of each checkout alternate, so that a GPU that slows down as it warms does so for both. Of each run, the median of
`step_seconds` in metrics.jsonl counts, after the steps in which kernels are compiled. Options that the checkouts name differently
cannot be compared this way.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.packs import write_corpus
from flame.compare.tables import format_table, show_range

REPO = Path(__file__).parent.parent
WARMUP = 10


def describe_run(corpus: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Options of the model, the data and the objective."""
    if arguments.config is not None:
        return {"job.config_file": arguments.config.resolve(), "lr_scheduler.warmup_steps": WARMUP}
    return {
        "model.config": REPO / "configs" / "models" / f"{arguments.model}.json",
        "model.tokenizer_path": "bytes",
        "training.dataset": "json",
        "training.data_files": corpus,
        "training.num_streams": 8,
        "training.seq_len": arguments.tokens,
        "training.context_len": 4096,
        "training.compile": "true",
        "objective.name": arguments.objective,
    }


def time_steps(checkout: Path, out: Path, run: dict[str, object], steps: int) -> float:
    """Median milliseconds of a step of one run."""
    shutil.rmtree(out, ignore_errors=True)
    options = run | {
        "job.dump_folder": out,
        "training.steps": WARMUP + steps,
        "checkpoint.enable_checkpoint": "false",
        "metrics.log_freq": 1,
    }
    command = [sys.executable, "-m", "flame.train"]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, cwd=checkout, env=environment, stdout=log, stderr=log)
    if done.returncode:
        print(out.with_suffix(".log").read_text()[-3000:], file=sys.stderr)
        raise SystemExit(f"{checkout}: ended with {done.returncode}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return 1000 * statistics.median(row["step_seconds"] for row in rows if row["step"] > WARMUP and "step_seconds" in row)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Steps of two checkouts, side by side.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for the runs and two_checkouts.md")
    parser.add_argument("--other", type=Path, required=True, help="the checkout to compare this one with")
    parser.add_argument(
        "--config", type=Path, help="configuration to train, instead of the options below but --steps and --rounds"
    )
    parser.add_argument("--model", default="llama_340M", help="file in configs/models (%(default)s)")
    parser.add_argument("--objective", default="future", help="objective.name (%(default)s)")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout (%(default)s)")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    corpus = (arguments.out / "corpus.jsonl").resolve()
    if arguments.config is None:
        write_corpus(corpus, min((WARMUP + arguments.steps + 4) * arguments.tokens, 40_000_000))
    run = describe_run(corpus, arguments)
    checkouts = {"this": REPO.resolve(), "other": arguments.other.resolve()}
    times: dict[str, list[float]] = {name: [] for name in checkouts}
    for turn in range(arguments.rounds):
        for name, checkout in checkouts.items():
            times[name].append(time_steps(checkout, (arguments.out / f"{name}_{turn}").resolve(), run, arguments.steps))
    ratios = [this / other for this, other in zip(times["this"], times["other"], strict=True)]
    what = arguments.config or f"{arguments.model}, {arguments.objective}, {arguments.tokens:,} tokens a step"
    title = f"{what}, {arguments.rounds} runs each, ms a step"
    row = [*(show_range(times[name], "{:.1f}") for name in checkouts), show_range(ratios, "{:.3f}")]
    lines = [f"### {title}", "", *format_table(["this", "other", "this / other"], [row]), ""]
    (arguments.out / "two_checkouts.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
