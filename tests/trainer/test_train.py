"""Whole runs of the trainer at toy size: resume, ranks, accumulation, switches, export."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame.checkpoints.manager import list_checkpoints
from flame.data.tokenizer import build_bytes_tokenizer
from flame.logging.plots import plot_run
from flame.train import main
from flame.weights.export import name_objective_file
from flame.weights.tensors import read_model_tensors
from tests.support.models import tiny_llama
from tests.support.runs import (
    MEASURED,
    MICRO_STEPS,
    REPO,
    SEQ_LEN,
    cut_power_after,
    final_weights,
    fork_ranks,
    measured,
    options,
    read_metrics,
    run_here,
)


def test_a_run_draws_its_curves(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("flame.logging.plots.plot_run", plot_run)
    run_here(workspace, tmp_path / "run", training__steps=2)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000


def test_a_run_leaves_metrics_checkpoints_and_a_model(plain_run):
    rows = read_metrics(plain_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert set(MEASURED) <= set(rows[0])
    assert rows[-1]["tokens_seen"] == 6 * MICRO_STEPS * SEQ_LEN
    assert rows[-1]["ce_loss"] < rows[0]["ce_loss"]
    assert [path.name for path in list_checkpoints(plain_run / "checkpoint")] == ["step-3", "step-6"]
    start = json.loads((plain_run / "starts.jsonl").read_text())
    assert start["start_step"] == 0
    head = subprocess.run(
        ["git", "-C", str(REPO), "rev-parse", "--verify", "-q", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert (start["git_revision"] or "").partition("-")[0] == head
    assert 'tokenizer_path = "bytes"' in (plain_run / "config.toml").read_text()


def test_the_exported_model_computes_what_was_trained(exported_run):
    weights = final_weights(exported_run)
    exported = AutoModelForCausalLM.from_pretrained(exported_run / "hf", dtype=torch.float32)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, weights[f"lm.{name}"])
    tokenizer = AutoTokenizer.from_pretrained(exported_run / "hf")
    assert exported.generation_config.eos_token_id == exported.config.eos_token_id == tokenizer.eos_token_id
    assert exported.config.use_cache
    text = "alpha beta\n\tgamma é"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with torch.no_grad():
        logits = exported(**tokenizer("alpha beta", return_tensors="pt")).logits
    assert logits.isfinite().all() and logits.shape[-1] == 264
    assert (exported_run / "hf" / name_objective_file("future")).exists()


def test_an_interrupted_run_equals_the_uninterrupted_one(workspace, tmp_path, plain_run):
    """Stopped after the checkpoint of step 3 and two more steps; the same command goes on from step 3, to the bit."""
    run = tmp_path / "run"
    argv = options(workspace, run)
    cut_power_after(5, argv)
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]

    main(argv)
    assert measured(read_metrics(run)) == measured(read_metrics(plain_run))
    found, expected = final_weights(run), final_weights(plain_run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [json.loads(line)["start_step"] for line in (run / "starts.jsonl").read_text().splitlines()] == [0, 3]


def test_a_finished_run_is_left_as_it_is(workspace, plain_run):
    before = read_metrics(plain_run)
    assert run_here(workspace, plain_run) == before


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(2, {}), pytest.param(4, {"training__data_parallel_replicate_degree": 2}, marks=pytest.mark.long)],
    ids=["fsdp", "hsdp"],
)
def test_ranks_and_accumulation_are_interchangeable(workspace, tmp_path, ranks, changes):
    """1 rank x 4 micro-steps = 2 ranks x 2 = 4 ranks (2 x 2 HSDP) x 1, dropout included."""
    alone = run_here(workspace, tmp_path / "alone", training__gradient_accumulation_steps=4)
    rows = fork_ranks(ranks, workspace, tmp_path / "run", training__gradient_accumulation_steps=4 // ranks, **changes)
    for found, expected in zip(measured(rows), measured(alone), strict=True):
        assert found == pytest.approx(expected, rel=2e-4), (found, expected)
    torch.testing.assert_close(final_weights(tmp_path / "run"), final_weights(tmp_path / "alone"), rtol=0, atol=2e-3)


@pytest.mark.long
def test_a_checkpoint_of_one_rank_resumes_on_two(workspace, tmp_path):
    run = tmp_path / "run"
    run_here(workspace, run, training__steps=3, lr_scheduler__decay_type="linear")
    reference = run_here(workspace, tmp_path / "reference", lr_scheduler__decay_type="linear")
    first = json.loads((list_checkpoints(run / "checkpoint")[-1] / "trainer.json").read_text())
    assert first["data"]["next_sequence"] == 3 * MICRO_STEPS
    rows = fork_ranks(
        2, workspace, run, training__gradient_accumulation_steps=MICRO_STEPS // 2, lr_scheduler__decay_type="linear"
    )
    # Steps 1 to 3 were made with the schedule of a three-step run; the data goes on exactly.
    assert [row["anchors"] for row in rows] == [row["anchors"] for row in reference]
    assert rows[-1]["tokens_seen"] == reference[-1]["tokens_seen"]


def test_loss_weight_zero_is_the_feature_switched_off(workspace, tmp_path):
    off = run_here(workspace, tmp_path / "off", objective__name="next_token", checkpoint__export_hf=True)
    zero = run_here(workspace, tmp_path / "zero", future_encoder__loss_weight=0.0, checkpoint__export_hf=True)
    assert measured(off) == measured(zero)
    assert "aux_loss" not in off[0]
    for run in ("off", "zero"):
        assert (tmp_path / run / "hf").is_dir() and not list((tmp_path / run / "hf").glob("*_modules.safetensors"))


def test_start_step_and_warmup(workspace, tmp_path, plain_run):
    """Before start_step the run is plain next-token training; then the weight grows. The predictor resumes from before it too."""
    changes = {"objective__start_step": 5, "objective__warmup_steps": 2, "future_encoder__loss_weight": 0.5}
    rows = run_here(workspace, tmp_path / "run", **changes)
    assert [row.get("loss_weight") for row in rows] == [None] * 4 + [0.25, 0.5]
    assert ["aux_loss" in row for row in rows] == [False] * 4 + [True] * 2
    for row in rows[4:]:
        assert row["loss"] == pytest.approx(row["ce_loss"] + row["loss_weight"] * row["aux_loss"], rel=1e-5)
    off = run_here(workspace, tmp_path / "off", objective__name="next_token")
    assert measured(rows[:4]) == measured(off[:4])


def test_freezing_trains_the_predictor_alone(workspace, tmp_path):
    run = tmp_path / "run"
    rows = run_here(workspace, run, experimental__freeze_lm_for_infonce=True)
    first, last = (read_model_tensors(path) for path in list_checkpoints(run / "checkpoint"))
    assert all(torch.equal(first[name], last[name]) for name in first if name.startswith("lm."))
    assert any(not torch.equal(first[name], last[name]) for name in first if name.startswith("objective.predictor."))
    assert "ce_loss" not in rows[0] and rows[-1]["aux_loss"] < rows[0]["aux_loss"]


def test_activation_checkpointing_changes_nothing(workspace, tmp_path, plain_run):
    changes = {"training__steps": 3, "checkpoint__enable_checkpoint": False, "training__compile": True}
    for mode in ("full", "selective", "pointwise"):
        with torch.compiler.set_stance("force_eager"):
            rows = run_here(workspace, tmp_path / mode, activation_checkpoint__mode=mode, **changes)
        for found, expected in zip(rows[:2], read_metrics(plain_run)[:2], strict=True):  # the schedule's decay starts after that
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_loss_that_is_not_finite(workspace, tmp_path, capsys):
    """A huge learning rate blows the weights up: the run stops with one line, or skips and then stops."""
    changes = {"optimizer__lr": 1e30, "lr_scheduler__warmup_steps": 0}
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, tmp_path / "stop", **changes, training__max_skipped_steps=1)
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and line.startswith("step 2: loss ") and "gradient norm nan; sequence 2 (json: documents " in line
    assert "training.max_skipped_steps = 1" in line
    dist.destroy_process_group()
    with pytest.raises(SystemExit):
        run_here(workspace, tmp_path / "skip", **changes, training__max_skipped_steps=3)
    assert "training.max_skipped_steps = 3" in capsys.readouterr().err
    assert [row["skipped_steps"] for row in read_metrics(tmp_path / "skip")] == [0, 1, 2]


def test_a_damaged_checkpoint_is_passed_over(workspace, tmp_path, plain_run, caplog):
    """Whatever is broken in the newest one, the run goes on from the one before and ends as if nothing had happened."""
    damages = {
        "missing shard": "No such file",
        "truncated shard": "Error",
        "empty state": "Expecting value",
        "torn state": "Expecting",
    }
    for damage, reason in damages.items():
        run = tmp_path / damage
        shutil.copytree(plain_run, run)
        newest = list_checkpoints(run / "checkpoint")[-1]
        shard = next(newest.glob("*.distcp"))
        if damage == "truncated shard":
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        elif damage == "missing shard":
            shard.unlink()
        else:
            (newest / "trainer.json").write_text("" if damage == "empty state" else '{"step": 6')
        rows = run_here(workspace, run)
        assert "step-6 cannot be read and is passed over" in caplog.text, damage
        assert reason in caplog.text, damage
        caplog.clear()
        assert measured(rows) == measured(read_metrics(plain_run)), damage


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"objective__name": "next_token"}, 'objective.name = "next_token" (or its loss_weight), but'),
        ({"future_encoder__loss_weight": 0.0}, 'objective.name = "next_token" (or its loss_weight), but'),
        ({"model__tokenizer_path": "{other}/tokenizer"}, "model.tokenizer_path: the tokenizer (fingerprint"),
        ({"model__config": "{other}/model"}, "model.config: hidden_size = 64 (before: 32), num_hidden_layers = 3 (before: 2)"),
        ({"training__seed": 43}, "training.seed = 43, but the run in"),
        ({"training__steps": 5}, "training.steps = 5, but the run in"),
        ({"checkpoint__enable_checkpoint": False}, "checkpoint.enable_checkpoint = false would start over in it"),
    ],
)
def test_a_run_is_not_continued_as_another_one(workspace, tmp_path, plain_run, capsys, changes, expected):
    tokenizer = build_bytes_tokenizer()
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tiny_llama(vocab_size=264, hidden_size=64, num_hidden_layers=3).save_pretrained(tmp_path / "model")
    changes = {k: v.format(other=tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    before = (plain_run / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, plain_run, **changes)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and "\n" not in error
    assert (plain_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training__seq_len": 512, "training__context_len": 300}, "max_position_embeddings = 256"),
        ({"model__config": "{small}"}, "vocab_size is 100"),
        ({"model__config": "{sliding}"}, "sliding_window = 1 is not supported"),
        ({"model__config": "{unknown}"}, "cannot be loaded by transformers"),
        ({"training__text_column": "body"}, "yields no usable text"),
    ],
)
def test_mistakes_that_only_show_later_are_one_line(workspace, tmp_path, capsys, changes, expected):
    tiny_llama(vocab_size=100).save_pretrained(tmp_path / "small")
    (tmp_path / "sliding.json").write_text('{"model_type": "mistral", "sliding_window": 1, "vocab_size": 300}')
    (tmp_path / "unknown.json").write_text('{"model_type": "abacus"}')
    places = {"small": tmp_path / "small", "sliding": tmp_path / "sliding.json", "unknown": tmp_path / "unknown.json"}
    changes = {key: value.format(**places) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, tmp_path / "run", **changes)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and "\n" not in error
