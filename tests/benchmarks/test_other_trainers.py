"""Steps in 8 bits and of other trainers beside ours: they are built and run, and one that fails leaves the others their table."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed import destroy_process_group
from transformers import AutoModelForCausalLM

from benchmarks import peer_worker
from benchmarks.other_trainers import BFLOAT16, OURS, PEERS, Measurement, Pair, Peer, build_step, get_bare_step, show
from benchmarks.packs import draw_batch
from benchmarks.peer_models import transformers_trainer
from benchmarks.settings import SETTINGS
from benchmarks.timing import Report, Timing
from benchmarks.training_step import OUT_OF_MEMORY, TrainingStep
from flame.config.schema import Training
from flame.objectives.step import Requested, compute_losses
from flame.runtime.distributed import set_single_process_defaults, start_processes
from tests.support.models import tiny_llama

NEXT_TOKEN = SETTINGS["next token"]
FLOAT8, FLOAT8_HEAD, *_ = OURS


def test_step_is_forward_and_backward_of_the_next_token(toy, mesh):
    batch, step = draw_batch(96, 61, mean=30), build_step(toy, 96, NEXT_TOKEN, mesh, compiled=False)
    step.take(batch)
    run = get_bare_step(step)
    run()
    first = step.loss
    run()
    assert torch.equal(step.loss, first)  # no optimizer
    torch.testing.assert_close(first, step.model(compute_losses, batch, Requested(aux=False)).ce_sum.detach() / batch.num_labels)


def test_what_the_device_cannot_run_leaves_the_others(toy, mesh):
    measurement = Measurement(64, mesh, toy, compiled=False)
    pair = measurement.measure_own(FLOAT8, OURS[FLOAT8])
    assert pair.bfloat16 is not None and pair.bfloat16.median_ms > 0 and pair.other is None
    assert pair.fault.startswith('UserError: training.float8 = "rowwise') and " needs a GPU" in pair.fault
    pair = measurement.measure_own("the same", NEXT_TOKEN)
    assert None not in pair and not pair.fault


def test_a_step_that_fails_later_leaves_the_others(toy, mesh, monkeypatch):
    own, calls = TrainingStep.step, []

    def step(self, with_aux=True, with_optimizer=True):
        calls.append(self)
        if self is not calls[0] and calls.count(self) == 3:
            raise torch.OutOfMemoryError
        own(self, with_aux, with_optimizer)

    monkeypatch.setattr(TrainingStep, "step", step)
    pair = Measurement(64, mesh, toy, compiled=False).measure_own("the same", NEXT_TOKEN)
    assert pair.bfloat16 is not None and pair == Pair(pair.bfloat16, None, OUT_OF_MEMORY)


@pytest.mark.slow
def test_a_peer_that_ends_leaves_the_others(toy, mesh, tmp_path):
    measurement = Measurement(64, mesh, toy, compiled=False)
    peer = Peer(["titan", "--attention", "none"], toy, measurement.batch, tmp_path)
    pair = measurement.measure_peer("peer", peer)
    assert pair.bfloat16 is not None and (pair.other, pair.fault) == (None, "failed")


def test_table_is_written_without_what_failed(tmp_path):
    own = Timing(16.0, 15.0, 17.0, 0, 0)
    peer = next(iter(PEERS))
    pairs = {
        FLOAT8: Pair(own, Timing(8.0, 7.5, 9.0, 0, 0)),
        FLOAT8_HEAD: Pair(own, None, "RuntimeError: x"),
        peer: Pair(None, Timing(20.0, 19.0, 21.0, 0, 0)),
    }
    show(Report(tmp_path / "table.md"), 1000, pairs)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line for line in lines if line.startswith(("| ours", "| torchtitan"))] == [
        f"| {FLOAT8} | 8.0 [7.5, 9.0] | 125,000 | 16.0 [15.0, 17.0] | 2.000 |",
        f"| {FLOAT8_HEAD} | RuntimeError: x | - | 16.0 [15.0, 17.0] | - |",
        f"| {peer} | 20.0 [19.0, 21.0] | 50,000 | failed | - |",
    ]
    assert any(BFLOAT16 in line for line in lines)


def test_the_step_of_transformers_is_that_of_its_documents(toy, monkeypatch):
    """Against each document alone, in float32."""
    batch, losses = draw_batch(96, 61, mean=30), []
    pack = {"input_ids": batch.input_ids, "labels": batch.labels, "cu_seqlens": batch.cu_seqlens}
    built = AutoModelForCausalLM.from_config
    models = []
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_config", lambda *args, **kwargs: models.append(built(*args, **kwargs)) or models[0]
    )
    monkeypatch.setattr(torch, "autocast", lambda *_: torch.enable_grad())
    step = transformers_trainer.build_step(json.loads(toy.read_text()), pack, argparse.Namespace(compile=False))
    (model,) = models
    model.register_forward_hook(lambda *found: losses.append(found[-1].loss))
    step()
    total = 0.0
    for start, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
        logits = model(batch.input_ids[:, start:end]).logits
        total += F.cross_entropy(logits[0], batch.labels[0, start:end], ignore_index=-100, reduction="sum").item()
    assert math.isclose(losses[0].item(), total / batch.num_labels, rel_tol=1e-5)


def test_a_peer_of_another_version_is_not_run(toy, monkeypatch):
    monkeypatch.setitem(peer_worker.KINDS, "titan", ("torchtitan", "0.0.1"))
    with pytest.raises(SystemExit, match=r"torchtitan .* is first on the import path: .* a folder that holds 0\.0\.1"):
        peer_worker.main(["titan", str(toy), "pack.pt"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", OURS)
def test_all_of_ours_on_a_gpu(tmp_path: Path, name: str):
    pytest.importorskip("torchao")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_llama(**shape, vocab_size=512, head_dim=64).to_json_file(tmp_path / "toy.json")
    set_single_process_defaults()
    _, mesh = start_processes(Training(), 60)
    try:
        pair = Measurement(1024, mesh, tmp_path / "toy.json").measure_own(name, OURS[name])
        assert None not in pair and not pair.fault
    finally:
        destroy_process_group()
