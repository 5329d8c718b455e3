"""A rank is lost, then half of the GPUs: `kill -9` in a step, resumed on as many ranks, killed again, resumed on half of them.

    python -m benchmarks.fault_ranks OUT [--ranks 2] [--steps 120] [further options of the runs]

The toy model of `benchmarks.faults`, with asynchronous checkpoints and deterministic kernels. An uninterrupted run on all ranks
runs beside it, on the same GPUs. On half of the ranks each makes twice the micro-steps, so that a step has the same sequences.

Compared with the uninterrupted run, by step: losses, gradient norms and tokens seen, to the bit while all ranks run, and to
rounding after; and the audits, which say which tokens of which documents each sequence held. Prints a table and writes
OUT/result.json. The exit code is 1 if one of them is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.faults import (
    MODEL,
    OPTIONS,
    Bench,
    count_steps,
    find_differences,
    find_workers,
    read_lines,
    read_steps,
    wait_for_step,
)
from flame.compare.tables import format_table
from flame.data.audit import read_audit

EXACT = ("tokens_seen", "lr")
"""What does not depend on the number of ranks."""
ROUNDING = 2e-2
"""Largest difference of a loss on another number of ranks, of itself: bfloat16, added in another order."""
COLUMNS = ("ranks", "steps", "resumed from", "ended with", "losses and gradient norms", "tokens and documents")


@dataclass
class Stage:
    """The steps of the run that were made on some number of ranks, from one start to the next."""

    ranks: int
    first: int
    last: int
    exit_code: int
    differing_steps: int = 0
    largest_difference: float = 0.0
    """Of a loss, as a fraction of it."""
    miscounted_steps: int = 0
    """Steps with other tokens or sequences."""

    def show(self) -> list[str]:
        losses = f"{self.differing_steps} steps differ, losses by up to {self.largest_difference:.1e} of them"
        account = f"{self.miscounted_steps} steps differ" if self.miscounted_steps else "the same"
        cells = [str(self.ranks), f"{self.first} to {self.last}", str(self.first - 1), str(self.exit_code)]
        return [*cells, losses if self.differing_steps else "bit-equal", account]


def read_sequences(run: Path) -> dict[int, list[str]]:
    """What each step was trained on, from a run's audit: a line for each sequence, whichever rank had it."""
    steps: dict[int, list[str]] = {}
    for line in read_audit(run):
        steps.setdefault(line["step"], []).append(json.dumps([line[key] for key in ("sequence", "source", "trained", "pieces")]))
    return {step: sorted(lines) for step, lines in steps.items()}


def judge(stages: list[Stage], run: Path, reference: Path) -> None:
    """Fill in how the steps of the stages differ from the uninterrupted run's."""
    found, expected = read_steps(run), read_steps(reference)
    sequences, own = read_sequences(reference), read_sequences(run)
    for stage in stages:
        for step in range(stage.first, stage.last + 1):
            row = found.get(step)
            differences = find_differences(row, expected[step]) if row is not None else {"loss": float("inf")}
            losses = [differences[name] / abs(expected[step][name]) for name in differences if name.endswith("loss")]
            stage.differing_steps += any(differences.values())
            stage.largest_difference = max(stage.largest_difference, *losses)
            is_counted = row is not None and not any(differences[name] for name in EXACT)
            stage.miscounted_steps += not is_counted or own.get(step) != sequences[step]


def is_lossless(stages: Iterable[Stage], ranks: int) -> bool:
    """Whether nothing was lost: bit-equal on all ranks, and to rounding on fewer."""
    return all(
        not stage.miscounted_steps
        and (not stage.differing_steps if stage.ranks == ranks else stage.largest_difference <= ROUNDING)
        for stage in stages
    )


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()


def lose_ranks(bench: Bench, run: Path, reference: Path) -> list[Stage]:
    """Make both runs.

    Raises:
        SystemExit: one ends where it should not.
    """
    with ExitStack() as running:  # what is left after a failure is asked to end

        def start(each: Bench, folder: Path) -> subprocess.Popen[bytes]:
            process = each.start(folder)
            running.callback(end, process)
            return process

        alone = start(bench, reference)
        half = replace(bench, ranks=bench.ranks // 2)
        key = "training.gradient_accumulation_steps"
        half.changes = bench.changes | {key: int(str(OPTIONS[key])) * bench.ranks // half.ranks}
        codes = []
        for each, strikes_at in ((bench, bench.steps // 3), (bench, 2 * bench.steps // 3), (half, None)):
            before = len(read_lines(run / "starts.jsonl"))
            process = start(each, run)
            if strikes_at is not None:
                wait_for_step(process, run, before, strikes_at)
                if workers := find_workers(process.pid):
                    os.kill(bench.chooser.choice(workers), signal.SIGKILL)
            codes.append(process.wait())
            print(f"{each.ranks} ranks: exit code {codes[-1]} at step {count_steps(run)} of {bench.steps}", file=sys.stderr)
            if (codes[-1] == 0) != (strikes_at is None):
                raise SystemExit(f"see {bench.out}/{run.name}.log")
        if alone.wait() != 0:
            raise SystemExit(f"see {bench.out}/{reference.name}.log")
    starts = [row["start_step"] for row in read_lines(run / "starts.jsonl")]
    ends = [*starts[1:], bench.steps]
    ranks = (bench.ranks, bench.ranks, half.ranks)
    return [Stage(*each) for each in zip(ranks, (start + 1 for start in starts), ends, codes, strict=True)]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="A run loses a rank, and then half of its GPUs.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="empty folder for the runs")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0, help="decides which rank is killed")
    known, extra = parser.parse_known_args(argv)
    if known.ranks < 2 or known.ranks % 2:
        parser.error(f"--ranks {known.ranks}: allowed is an even number")
    out = known.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.json").write_text(json.dumps(MODEL))
    changes: dict[str, object] = {"checkpoint.async_mode": "async", "training.deterministic": "true", "training.audit": "true"}
    bench = Bench(out, known.ranks, known.steps, extra, random.Random(known.seed), changes)
    run, reference = out / "disturbed", out / "uninterrupted"
    stages = lose_ranks(bench, run, reference)
    judge(stages, run, reference)
    (out / "result.json").write_text(json.dumps([asdict(stage) for stage in stages], indent=1))
    print("\n".join(format_table(COLUMNS, [stage.show() for stage in stages])))
    return int(not is_lossless(stages, known.ranks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
