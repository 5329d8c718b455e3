"""Whole comparisons of the trainer itself, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flame.compare.command import main
from flame.compare.results import read_result
from flame.compare.runs import list_runs, read_spec
from tests.support.runs import SEQ_LEN

SPEC = """
[compare]
out = "{folder}/out"
seeds = [1]
parallel = 2
{budget}

[tasks.toy]
config = "{folder}/run.toml"

[arms.next_token]
[arms.mtp]
objective.name = "mtp"

[metrics.ce_loss]
"""
RUN = f"""
[model]
config = "{{workspace}}/model"
tokenizer_path = "bytes"
[training]
dataset = "json"
data_files = "{{workspace}}/corpus.jsonl"
num_streams = 12
num_workers = 0
seq_len = {SEQ_LEN}
context_len = 48
[lr_scheduler]
warmup_steps = 1
[checkpoint]
export_hf = false
[metrics]
log_freq = 1
"""


def write_files(folder: Path, workspace: Path, budget: str) -> str:
    (folder / "run.toml").write_text(RUN.format(workspace=workspace))
    (folder / "spec.toml").write_text(SPEC.format(folder=folder, budget=budget))
    return str(folder / "spec.toml")


@pytest.mark.slow
def test_two_arms_are_compared(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)  # the runs find their code from anywhere
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    spec = write_files(tmp_path, workspace, f"tokens = {2 * SEQ_LEN}")
    assert main([spec]) == 0
    results = [read_result(run.folder) for run in list_runs(read_spec(spec))]
    assert [result.steps for result in results] == [2, 2] and results[0].first_step["data"] == results[1].first_step["data"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "2 of 2 runs have ended" in report and "Not counted" not in report and "| 1/1 |" in report
    stamps = [(result.folder / "metrics.jsonl").stat().st_mtime_ns for result in results]
    capfd.readouterr()
    assert main([spec]) == 0 and capfd.readouterr().out.startswith("report: ")
    assert stamps == [(result.folder / "metrics.jsonl").stat().st_mtime_ns for result in results]


@pytest.mark.long
def test_seconds_are_steps(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    spec = write_files(tmp_path, workspace, "seconds = 1")
    assert main([spec]) == 0
    record = json.loads((tmp_path / "out/toy/mtp/seed-1/compare.json").read_text())
    assert record["steps"] == read_result(tmp_path / "out/toy/mtp/seed-1").steps > 0


@pytest.mark.gpu
def test_runs_on_a_gpu_are_compared(workspace: Path, tmp_path: Path):
    spec = write_files(tmp_path, workspace, f"tokens = {2 * SEQ_LEN}")
    assert main([spec]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Not counted" not in report and "NVIDIA" in report
