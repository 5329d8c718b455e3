"""Runs that start from a Hugging Face folder, through the trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from flame.data.tokenizer import build_bytes_tokenizer
from flame.errors import UserError
from flame.objectives.step import Requested, compute_losses
from flame.runtime.distributed import end_processes, set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options
from flame.weights.assets import read_generation_settings, write_hf_assets
from flame.weights.to_checkpoint import convert_to_checkpoint as convert
from tests.support.families import build_toy
from tests.support.runs import measured, options, run_here


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A mixture of experts, in several files of bfloat16, with its tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(build_toy("qwen3_moe", vocab_size=264), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="40KB")
    build_bytes_tokenizer().save_pretrained(folder)
    return folder


def from_weights(source: Path) -> dict[str, object]:
    """Nothing but the weights is named."""
    return {"model__config": None, "model__tokenizer_path": None, "checkpoint__initial_load_path": source}


def test_the_first_loss_is_that_of_the_weights(source, workspace, tmp_path):
    set_single_process_defaults()
    trainer = Trainer(read_options(options(workspace, tmp_path / "run", **from_weights(source)), 1))
    trainer._resume()
    trainer._open_run()
    batch = trainer._next_batches()[0]
    with torch.no_grad():
        losses = trainer.model(compute_losses, batch, Requested(aux=True))
    trainer._close_run()
    end_processes()

    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = 0.0
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        ids = batch.input_ids[:, start:end]
        if ids.shape[1] > 1:
            with torch.no_grad():
                expected += reference(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert losses.ce_sum is not None
    assert losses.ce_sum.item() == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_goes_on_from_its_own_weights(source, workspace, tmp_path, caplog):
    run = tmp_path / "run"
    rows = measured(run_here(workspace, run, **from_weights(source)))
    assert "weights from checkpoint.initial_load_path" in caplog.text
    caplog.clear()
    shutil.rmtree(run / "checkpoint" / "step-6")
    assert measured(run_here(workspace, run, **from_weights(source))) == rows
    assert "resumed after step 3" in caplog.text and "weights from" not in caplog.text


def test_weights_named_for_a_run_with_checkpoints_are_said_to_have_no_effect(source, workspace, tmp_path, caplog):
    run = tmp_path / "run"
    run_here(workspace, run, training__steps=2)
    run_here(workspace, run, training__steps=3, checkpoint__initial_load_path=source)
    assert f'checkpoint.initial_load_path = "{source}" has no effect: the weights are those of the run in {run}' in caplog.text
    assert "objective: future, loss_weight" in caplog.text


def test_a_converted_model_is_no_run_to_go_on_with(source, workspace, tmp_path, capsys):
    run = tmp_path / "run"
    convert(str(source), run / "checkpoint" / "step-0")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, run, **from_weights(source))
    assert stop.value.code == UserError.EXIT_CODE
    error = capsys.readouterr().err.strip()
    assert f'"{run / "checkpoint" / "step-0"}" is a converted model, which no run has made' in error
    assert "\n" not in error and "name it in checkpoint.initial_load_path" in error

    dist.destroy_process_group()
    weights = (run / "checkpoint").rename(run / "weights") / "step-0"
    assert run_here(workspace, run, **from_weights(weights), training__steps=1)[-1]["step"] == 1


# ---------------------------------------------------------------- settings for generation


def read_settings(folder: Path) -> dict[str, object]:
    return json.loads((folder / "generation_config.json").read_text())


def test_settings_for_generation_come_along(source, workspace, tmp_path):
    """From the first weights into the exported model, and from checkpoint to checkpoint where the first weights are gone."""
    tokenizer = build_bytes_tokenizer()
    weights = shutil.copytree(source, tmp_path / "weights")
    settings = {"do_sample": True, "top_k": 7, "eos_token_id": [3, tokenizer.eos_token_id], "transformers_version": "5.0.0"}
    (weights / "generation_config.json").write_text(json.dumps(settings))
    run = tmp_path / "run"
    few_steps = {"training__steps": 2, "checkpoint__interval": 1, "checkpoint__export_hf": True}
    started = from_weights(weights) | few_steps
    run_here(workspace, run, **started)
    expected = settings | {"pad_token_id": tokenizer.pad_token_id}
    assert read_settings(run / "hf") == expected

    (weights / "generation_config.json").unlink()
    shutil.rmtree(run / "checkpoint" / "step-2")
    shutil.rmtree(run / "hf")
    run_here(workspace, run, **started)
    assert read_settings(run / "hf") == expected

    again = {"model__config": None, "model__tokenizer_path": None, "checkpoint__initial_load_path": run / "checkpoint" / "step-2"}
    run_here(workspace, tmp_path / "from checkpoint", **again, **few_steps)
    assert read_settings(tmp_path / "from checkpoint" / "hf") == expected
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "from checkpoint" / "hf").generation_config.top_k == 7


@pytest.mark.parametrize("ends", [5, [5, 6], None], ids=["another", "others", "none"])
def test_generation_stops_where_training_ended_documents(ends, tmp_path):
    tokenizer = build_bytes_tokenizer()
    write_hf_assets(build_toy("qwen3_moe", vocab_size=264), tokenizer, {"top_k": 7, "eos_token_id": ends}, tmp_path)
    settings = read_settings(tmp_path)
    assert settings["eos_token_id"] == tokenizer.eos_token_id and settings["top_k"] == 7


def test_several_end_tokens_stay_several(tmp_path):
    """Those of the configuration that the model was built from, and those of the settings for generation."""
    config = build_toy("llama", vocab_size=264, eos_token_id=[1, 256, 3])
    write_hf_assets(config, build_bytes_tokenizer(), {"top_k": 7, "eos_token_id": [3, 256]}, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [1, 256, 3]
    assert read_settings(tmp_path)["eos_token_id"] == [3, 256]


def test_what_the_tokenizer_lacks_stays(tmp_path):
    tokenizer = build_bytes_tokenizer()
    tokenizer.pad_token = None
    assert tokenizer.bos_token_id is None
    write_hf_assets(build_toy("qwen3_moe", vocab_size=264), tokenizer, {"pad_token_id": 4, "bos_token_id": 5}, tmp_path)
    assert read_settings(tmp_path) == {"pad_token_id": 4, "bos_token_id": 5, "eos_token_id": tokenizer.eos_token_id}


@pytest.mark.parametrize("content", ["{", "[]", '{"max_new_tokens": 0}', '{"compile_config": {"mode": "default"}}'])
def test_settings_that_transformers_does_not_take_are_named(content, tmp_path):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"^the label: generation_config\.json cannot be used.* mend or remove it$"):
        read_generation_settings(tmp_path, "the label")
