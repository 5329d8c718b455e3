"""The time to the first step, of commands that stand for runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.start import measure_start

RUN = """
import sys, time
time.sleep(0.3)
print("a line", flush=True)
time.sleep(0.3)
open(sys.argv[1], "w").write("{}")
time.sleep(60)
"""


def test_a_run_is_ended_after_its_first_step(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("of an earlier start")
    found = measure_start([sys.executable, "-c", RUN, str(metrics)], metrics, {}, tmp_path / "log")
    assert 0.3 <= found.first_line < found.first_step < 30 and found.first_step - found.first_line > 0.2


def test_a_run_without_a_step_is_no_start(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(SystemExit, match="exit code 3: see"):
        measure_start(command, tmp_path / "metrics.jsonl", {}, tmp_path / "log")
