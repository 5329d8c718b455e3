"""Runs that start from a Hugging Face folder, through the trainer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flame.components.distributed import end_processes, set_single_process_defaults
from flame.config_reader import read_config
from flame.data.tokenizer import build_bytes_tokenizer
from flame.objective import Parts, compute_losses
from flame.train import Trainer
from tests.test_train import leave_no_trace, measured, options, run_here, workspace  # noqa: F401 - fixtures
from tests.toy_families import build_toy


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


def test_the_first_loss_is_that_of_the_weights(source, workspace, tmp_path):  # noqa: F811
    set_single_process_defaults()
    trainer = Trainer(read_config(options(workspace, tmp_path / "run", **from_weights(source)), 1))
    trainer._open_run(trainer._resume())
    batch = trainer._next_batches()[0]
    with torch.no_grad():
        losses = trainer.model(compute_losses, batch, trainer.config, Parts(aux=True))
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


def test_a_resumed_run_goes_on_from_its_own_weights(source, workspace, tmp_path, caplog):  # noqa: F811
    run = tmp_path / "run"
    rows = measured(run_here(workspace, run, **from_weights(source)))
    assert "weights from checkpoint.initial_load_path" in caplog.text
    caplog.clear()
    shutil.rmtree(run / "checkpoint" / "step-6")
    assert measured(run_here(workspace, run, **from_weights(source))) == rows
    assert "resumed after step 3" in caplog.text and "weights from" not in caplog.text
