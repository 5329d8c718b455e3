"""How long a run trains, by tokens, epochs or FLOPs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flame.cli.preprocess import main as preprocess
from flame.config.help import write_config
from flame.config.schema import JobConfig, Training
from flame.data.passes import estimate_repeats
from flame.train import main
from flame.trainer.budget import _warn_of_repeats
from flame.trainer.options import read_options
from tests.support.options import read_mistakes
from tests.support.runs import MICRO_STEPS, SEQ_LEN, final_weights, measured, options, read_metrics, run_here

QUICK = {"training__steps": None}
TOKENS_PER_STEP = MICRO_STEPS * SEQ_LEN


@pytest.fixture(scope="module")
def token_folder(workspace, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokens") / "folder"
    source = ["--dataset", "json", "--data_files", str(workspace / "corpus.jsonl"), "--tokenizer_path", "bytes"]
    preprocess([*source, "--out", str(out), "--num_workers", "0"])
    return out


@pytest.mark.parametrize("tokens", [6 * TOKENS_PER_STEP, 5 * TOKENS_PER_STEP + 1])
def test_tokens_are_as_many_steps_as_they_take(workspace, tmp_path, plain_run, caplog, tokens):
    rows = run_here(workspace, tmp_path / "run", **QUICK, training__tokens=tokens)
    assert measured(rows) == measured(read_metrics(plain_run))
    assert f"training.tokens = {tokens:g}: up to step 6, of {TOKENS_PER_STEP} tokens each" in caplog.messages
    assert "steps = 6" in (tmp_path / "run" / "config.toml").read_text()


def test_a_budget_is_the_same_after_a_resume_with_larger_steps(workspace, tmp_path):
    """Two steps, then steps of twice as many sequences."""
    run = tmp_path / "run"
    run_here(workspace, run, **QUICK, training__tokens=2 * TOKENS_PER_STEP)
    larger = {"training__tokens": 8 * TOKENS_PER_STEP, "training__gradient_accumulation_steps": 2 * MICRO_STEPS}
    rows = run_here(workspace, run, **QUICK, **larger)
    assert (rows[-1]["step"], rows[-1]["tokens_seen"]) == (5, 8 * TOKENS_PER_STEP)
    assert run_here(workspace, run, **QUICK, **larger) == rows


def test_epochs_of_a_token_folder(workspace, tmp_path, token_folder, caplog):
    texts = [len(line) - len('{"text": ""}\n') for line in (workspace / "corpus.jsonl").read_text().splitlines(keepends=True)]
    changes = QUICK | {"training__dataset": "tokens", "training__data_files": token_folder, "validation__holdout_every": 5}
    rows = run_here(workspace, tmp_path / "run", **changes, training__epochs=0.5)
    tokens = sum(length + 1 for index, length in enumerate(texts) if index % 5)
    assert rows[-1]["step"] == -(-round(tokens / 2) // TOKENS_PER_STEP)


def test_uneven_passes_are_told_with_what_makes_them_even(caplog):
    """Of documents of unequal length; on a new run alone, whose streams can still be chosen."""
    config = JobConfig(training=Training(num_streams=48, num_workers=2), world_size=2)
    lengths = np.random.default_rng(0).lognormal(5.0, 1.0, 2000).astype(np.int64)
    _warn_of_repeats(config, np.full(4800, 100), 1.0)
    assert not caplog.messages
    _warn_of_repeats(config, lengths, 1.0)
    (line,) = caplog.messages
    assert line == (
        f"training.epochs = 1: about {estimate_repeats(lengths, 48, 1.0):.0%} of the tokens are read once too often, and as many "
        "once too seldom, since 2000 documents of unequal length are dealt to training.num_streams = 48 streams: with "
        f"training.num_streams = 4 it is {estimate_repeats(lengths, 4, 1.0):.0%}"
    )


def curriculum(name: str) -> dict[str, object]:
    """Multi-token prediction of which a step takes more or less as the run goes on."""
    return {"objective__name": "mtp", "mtp__tokens": 3, "mtp__curriculum": name, "mtp__loss_weight": 1.0}


@pytest.mark.parametrize(
    ("changes", "steps"), [({"objective__start_step": 3}, 4), (curriculum("forward"), 6), (curriculum("reverse"), 6)]
)
def test_flops_are_counted_as_they_are_logged(workspace, tmp_path, changes, steps):
    changes = QUICK | {"training__seq_len": 128} | changes
    per_step = [row["step_tflops"] for row in run_here(workspace, tmp_path / "known", **changes | {"training__steps": steps})]
    assert max(per_step) > 1.2 * min(per_step)
    rows = run_here(workspace, tmp_path / "run", **changes, training__flops=sum(per_step) * 1e12 * 0.97)
    assert rows[-1]["step"] == steps
    assert all(torch.isfinite(weight).all() for weight in final_weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training__tokens": 512}, "training.steps = 6 and training.tokens = 512 all say how long to train"),
        (
            {"training__steps": None, "training__tokens": 512, "training__epochs": 2.0},
            "training.tokens = 512 and training.epochs = 2.0 all say how long to train",
        ),
        ({"training__steps": None, "training__flops": -1}, "training.flops = -1 (command line): allowed is a finite number > 0"),
    ],
)
def test_one_budget_is_given(workspace, tmp_path, changes, expected):
    (line,) = read_mistakes(options(workspace, tmp_path / "run", **changes))
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training__epochs": 2.0}, "training.epochs = 2 needs one source of counted tokens, and the run has training.dataset"),
        (
            {"training__flops": 1e300},
            "training.flops = 1e+300 comes to more than 1e+09 steps, the most that are allowed: lower it",
        ),
        ({"training__tokens": 10**18}, "training.tokens = 1e+18 comes to more than 1e+09 steps"),
    ],
)
def test_what_a_budget_comes_to_is_checked(workspace, tmp_path, capsys, changes, expected):
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, tmp_path / "run", **QUICK | changes)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and line.startswith(expected) and "\n" not in line


@pytest.mark.parametrize("epochs", [1e12, 1e306])
def test_epochs_have_an_end(workspace, tmp_path, token_folder, capsys, epochs):
    changes = QUICK | {"training__dataset": "tokens", "training__data_files": token_folder, "training__epochs": epochs}
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, tmp_path / "run", **changes)
    assert stop.value.code == 2 and "comes to more than 1e+09 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("filed", "typed", "expected"),
    [
        ("steps = 5", {"tokens": 512}, (1000, 512, None)),
        ("tokens = 512", {"steps": 2}, (2, None, None)),
        ("tokens = 512", {"epochs": 2.0}, (1000, None, 2.0)),
        ("tokens = 512", {"tokens": 1024}, (1000, 1024, None)),
        ("steps = 5", {"tokens": "none"}, (5, None, None)),
        ("steps = 5", {}, (5, None, None)),
    ],
)
def test_the_command_line_replaces_what_the_file_says(workspace, tmp_path, filed, typed, expected):
    (tmp_path / "run.toml").write_text(f"[training]\n{filed}\n")
    changes = {"training__steps": None, "job__config_file": tmp_path / "run.toml"}
    changes |= {f"training__{name}": value for name, value in typed.items()}
    training = read_options(options(workspace, tmp_path / "run", **changes), 1).training
    assert (training.steps, training.tokens, training.epochs) == expected


def test_two_in_one_file_are_refused(workspace, tmp_path):
    (tmp_path / "run.toml").write_text("[training]\nsteps = 5\ntokens = 512\n")
    changes = {"training__steps": None, "job__config_file": tmp_path / "run.toml"}
    (line,) = read_mistakes(options(workspace, tmp_path / "run", **changes))
    assert line.startswith("training.steps = 5 and training.tokens = 512 all say how long to train")


def test_a_run_restarts_from_its_own_config(workspace, tmp_path):
    """With the budget given again, and without."""
    run = tmp_path / "run"
    run_here(workspace, run, **QUICK, training__tokens=2 * TOKENS_PER_STEP)
    own = ["--job.config_file", str(run / "config.toml"), "--job.dump_folder", str(run)]
    main(own)
    main([*own, "--training.tokens", str(3 * TOKENS_PER_STEP)])
    assert read_metrics(run)[-1]["step"] == 3


def test_a_resolved_configuration_with_a_budget_is_read_back(workspace, tmp_path):
    config = read_options(options(workspace, tmp_path / "run", **QUICK, training__tokens=512), 1)
    write_config(config, tmp_path / "resolved.toml")
    again = read_options(["--job.config_file", str(tmp_path / "resolved.toml")], 1)
    assert again.training == config.training
