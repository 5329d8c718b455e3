"""Traces and snapshots: what is written, for which steps and ranks, and that nothing is without the options."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch

from flame.config.profiling import Profiling, read_spans
from flame.errors import UserError
from flame.trainer.profiler import PROFILE_FOLDER, Profiler
from tests.support.options import read_mistakes
from tests.support.refusals import expect_one_line
from tests.support.runs import MICRO_STEPS, measured, read_metrics, run_here

ONCE_A_STEP = ("waiting for data", "optimizer")
ONCE_A_MICRO_STEP = ("causal forward", "anti-causal forward", "cross entropy", "objective's loss", "backward")


@pytest.mark.parametrize(
    ("text", "spans"),
    {
        "": [],
        "7": [(7, 7)],
        " 500, 20-22 ": [(20, 22), (500, 500)],
        "3-2": None,
        "0": None,
        "1-4,4": None,
        "last": None,
        "1--2": None,
    }.items(),
)
def test_spans(text: str, spans: list[tuple[int, int]] | None):
    assert read_spans(text) == spans


def test_mistakes_are_told_in_a_line():
    lines = read_mistakes(["--profiling.trace_steps", "5-3", "--profiling.ranks", "1"])
    assert any(line.startswith('profiling.trace_steps = "5-3": allowed are steps') for line in lines)
    assert any(line.startswith('profiling.ranks = "1": allowed are "all", or ranks below 1') for line in lines)


def test_a_trace_holds_its_steps_and_names_their_parts(workspace: Path, tmp_path: Path, plain_run: Path):
    traced = run_here(workspace, tmp_path / "traced", profiling__trace_steps="2-3,5")
    assert not (plain_run / PROFILE_FOLDER).exists()
    assert measured(traced) == measured(read_metrics(plain_run))
    written = sorted(path.name for path in (tmp_path / "traced" / PROFILE_FOLDER).iterdir())
    assert written == ["trace-steps-2-3-rank-0.json.gz", "trace-steps-5-5-rank-0.json.gz"]
    names = _count_names(tmp_path / "traced" / PROFILE_FOLDER / written[0])
    expected = {part: 2 for part in ONCE_A_STEP} | {part: 2 * MICRO_STEPS for part in ONCE_A_MICRO_STEP}
    assert {part: names.get(part, 0) for part in expected} == expected


def test_a_rank_that_is_not_chosen_writes_nothing(tmp_path: Path):
    profiler = Profiler(Profiling(trace_steps="1", ranks="1,2"), tmp_path, rank=0, steps=range(5))
    with profiler.watch(1):
        pass
    assert not (tmp_path / PROFILE_FOLDER).exists()
    assert Profiling(ranks="all").includes_rank(5) and Profiling(ranks="1, 02").includes_rank(2)


def test_a_span_ends_with_the_run(workspace: Path, tmp_path: Path):
    run_here(workspace, tmp_path / "run", profiling__trace_steps="6-9")
    assert [path.name for path in (tmp_path / "run" / PROFILE_FOLDER).iterdir()] == ["trace-steps-6-6-rank-0.json.gz"]


@pytest.mark.gpu
def test_memory_is_written_when_asked_for_and_when_it_runs_out(workspace: Path, tmp_path: Path):
    run_here(workspace, tmp_path / "run", profiling__memory_steps="2", profiling__memory_history=True)
    snapshot = pickle.loads((tmp_path / "run" / PROFILE_FOLDER / "memory-step-2-rank-0.pickle").read_bytes())
    frames = [block["frames"] for segment in snapshot["segments"] for block in segment["blocks"] if block.get("frames")]
    assert any("flame" in frame["filename"] for each in frames for frame in each)
    profiler = Profiler(Profiling(), tmp_path, rank=0, steps=range(5))
    with pytest.raises(UserError, match="step 4: rank 0 has run out of GPU memory") as caught, profiler.watch(4):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert len(caught.value.lines) == 1
    assert (tmp_path / PROFILE_FOLDER / "out-of-memory-step-4-rank-0.pickle").exists()


@pytest.mark.parametrize(
    ("graph_bytes", "told"), [(0, "4.0 GiB: lower training.seq_len"), (3 << 30, "7.0 GiB: set training.cuda_graphs")]
)
def test_graphs_are_named_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, graph_bytes: int, told: str):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 4 << 30)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda _: None)
    profiler = Profiler(Profiling(), tmp_path, rank=0, steps=range(5))
    with pytest.raises(UserError) as caught, profiler.watch(4, lambda: graph_bytes):
        raise torch.OutOfMemoryError("x")
    expect_one_line(caught.value, told)


def _count_names(path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        if event.get("cat") == "user_annotation":
            counts[event["name"]] = counts.get(event["name"], 0) + 1
    return counts
