"""An objective in one file of the user's own, from the first step to the exported model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flame.checkpoints.manager import list_checkpoints
from flame.train import main
from flame.weights.tensors import read_model_tensors
from tests.support.paths import REPO
from tests.support.runs import cut_power_after, final_weights, measured, options, read_metrics, run_here

OWN = {
    "objective__name": None,
    "objective__path": REPO / "docs" / "examples" / "skip_token.py",
    "future_encoder__learnable_temperature": None,
    "future_predictor__dropout": None,
}


@pytest.fixture(scope="module")
def own_run(workspace, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    run = tmp_path_factory.mktemp("runs") / "own"
    run_here(workspace, run, **OWN, checkpoint__export_hf=True)
    return run


def expect_refusal(workspace: Path, run: Path, capsys: pytest.CaptureFixture, start: str, **changes: object) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, run, **OWN | changes)
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and line.startswith(start)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_it_is_trained_and_logged_with_its_metric(own_run):
    rows = read_metrics(own_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["skip_token_norm"] > 0 for row in rows)
    assert len({row["skip_token_norm"] for row in rows}) == 6
    assert rows[-1]["aux_loss"] < rows[0]["aux_loss"] and rows[-1]["ce_loss"] < rows[0]["ce_loss"]
    for row in rows:
        assert row["loss"] == pytest.approx(row["ce_loss"] + row["aux_loss"], rel=1e-5)
    first, last = (read_model_tensors(path) for path in list_checkpoints(own_run / "checkpoint"))
    assert not torch.equal(first["objective.map.weight"], last["objective.map.weight"])


def test_its_options_are_in_the_runs_configuration(own_run):
    text = (own_run / "config.toml").read_text()
    assert "[skip_token]" in text and "distance = 2" in text


def test_an_interrupted_run_equals_the_uninterrupted_one(workspace, tmp_path, own_run):
    argv = options(workspace, tmp_path / "run", **OWN)
    cut_power_after(5, argv)
    main(argv)
    names = ("step", "loss", "aux_loss", "skip_token_norm", "grad_norm")
    found, expected = ([[row[name] for name in names] for row in read_metrics(run)] for run in (tmp_path / "run", own_run))
    assert found == expected
    assert measured(read_metrics(tmp_path / "run")) == measured(read_metrics(own_run))
    weights = final_weights(own_run)
    resumed = final_weights(tmp_path / "run")
    assert resumed.keys() == weights.keys() and "objective.map.weight" in weights
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.items())
    starts = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["start_step"] for line in starts] == [0, 3]


def test_its_fixed_option_is_refused_at_a_resume(workspace, own_run, capsys):
    expect_refusal(workspace, own_run, capsys, "skip_token.distance = 3, but the run in", skip_token__distance=3)


def test_its_other_options_may_change_and_are_told(workspace, own_run, caplog):
    run_here(workspace, own_run, **OWN, skip_token__loss_weight=0.5)
    assert "changed since the checkpoint: skip_token.loss_weight: 1.0 -> 0.5" in caplog.text


def test_a_run_is_not_continued_without_it(workspace, own_run, capsys):
    expect_refusal(workspace, own_run, capsys, 'objective.name = "next_token"', objective__path=None)


def test_it_is_exported_beside_an_ordinary_model(own_run):
    weights, folder = final_weights(own_run), own_run / "hf"
    modules = load_file(folder / "skip_token_modules.safetensors")
    assert modules.keys() == {"map.weight"} and torch.equal(modules["map.weight"], weights["objective.map.weight"])
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, weights[f"lm.{name}"]) for name, tensor in exported.items())
    card = (folder / "README.md").read_text()
    assert "`skip_token_modules.safetensors`" in card and '"skip_token": loss_weight 1.0, distance 2' in card
    assert str(REPO) not in card
