"""`training.dropout` in runs: the same on any number of ranks and after a resume, off at 0, and in no validation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from flame.config.schema import JobConfig
from flame.models.dropout import add_dropout
from flame.models.parallelize import parallelize
from flame.models.wrapper import TrainingModel
from flame.objectives.step import Requested, compute_losses
from flame.runtime.seeds import derive_seed
from flame.train import main
from flame.trainer.setup import build_modules
from tests.support.models import build_unsharded, random_batch, random_cu_seqlens, shard, tiny_llama
from tests.support.objectives import choose
from tests.support.ranks import run_on_ranks
from tests.support.runs import cut_power_after, final_weights, measured, options, read_metrics, run_here

P, SEQUENCES = 0.3, 4
BRIEF = {
    "training__steps": 4,
    "training__gradient_accumulation_steps": 2,
    "checkpoint__interval": 2,
    "checkpoint__export_hf": False,
    "objective__name": "next_token",
    "future_encoder__learnable_temperature": None,
    "future_predictor__dropout": None,
}
UNTIED = tiny_llama(tie_word_embeddings=False)
"""Sharded or not, all of its weights are drawn once."""


def configure(recompute: str = "none", **changes: object) -> JobConfig:
    config = choose("future")
    config.training.dropout = P
    config.activation_checkpoint.mode = recompute  # type: ignore[assignment]
    for key, value in changes.items():
        setattr(config.training, key, value)
    return config


def accumulate(model: TrainingModel, indices: range) -> list[Tensor]:
    """Gradients of the sums of both losses over packed sequences, as the trainer runs them."""
    for index in indices:
        torch.manual_seed(derive_seed(42, index))
        losses = model(compute_losses, random_batch(random_cu_seqlens(24, 4, seed=index), seed=index), Requested(aux=True))
        (losses.ce_sum + losses.aux.loss_sum).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in gradients]


def accumulate_on_rank(_: Path, recompute: str) -> list[np.ndarray]:
    mesh, config = init_device_mesh("cpu", (2,)), configure(recompute)
    model = shard(build_modules(config, UNTIED, "cpu"), config, mesh)
    assert model.has_dropout
    return [gradient.numpy() for gradient in accumulate(model, range(mesh.get_local_rank(), SEQUENCES, 2))]


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    """1 rank x 4 micro-steps without FSDP = 2 ranks x 2 with it, recomputed."""
    model = build_unsharded(configure(), UNTIED)
    add_dropout(model.lm, P)
    expected = [gradient.numpy() for gradient in accumulate(model, range(SEQUENCES))]
    for found in run_on_ranks(2, tmp_path / "run", accumulate_on_rank, "full"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_equals_the_uninterrupted_one(workspace, tmp_path):
    """To the bit, validation included."""
    changes = BRIEF | {"training__dropout": P, "validation__interval": 2, "validation__holdout_every": 5}
    expected = run_here(workspace, tmp_path / "whole", **changes)
    argv = options(workspace, tmp_path / "run", **changes)
    cut_power_after(3, argv)
    main(argv)
    rows = read_metrics(tmp_path / "run")
    assert measured(rows) == measured(expected)
    assert [row.get("validation_ce_loss") for row in rows] == [row.get("validation_ce_loss") for row in expected]
    found, weights = final_weights(tmp_path / "run"), final_weights(tmp_path / "whole")
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_run_may_go_on_with_other_dropout(workspace, tmp_path, caplog):
    run = tmp_path / "run"
    run_here(workspace, run, **BRIEF | {"training__steps": 2})
    run_here(workspace, run, **BRIEF | {"training__dropout": P})
    assert "training.dropout: 0.0 -> 0.3" in caplog.text


def test_validation_is_without_it(workspace, tmp_path):
    """The step moves no weight, so both models are the same."""
    changes = BRIEF | {"training__steps": 1, "validation__interval": 1, "validation__holdout_every": 5}
    changes |= {"checkpoint__enable_checkpoint": False, "optimizer__lr": 1e-30}
    runs = [run_here(workspace, tmp_path / str(dropout), **changes, training__dropout=dropout) for dropout in (0.0, P)]
    plain, dropped = ({key: value for row in rows for key, value in row.items()} for rows in runs)
    assert dropped["validation_ce_loss"] == plain["validation_ce_loss"]
    assert dropped["ce_loss"] != plain["ce_loss"]


@pytest.mark.parametrize(("dropout", "is_frozen"), [(0.0, False), (P, True)])
def test_without_it_or_beside_a_frozen_model_nothing_is_installed(one_process, dropout, is_frozen):
    config = configure(dropout=dropout)
    config.experimental.freeze_lm_for_infonce = is_frozen
    model = build_modules(config, tiny_llama(), "cpu")
    before = [(type(module), len(module._forward_hooks)) for module in model.lm.modules()]
    with torch.device("meta"):
        parallelize(model, [], [], config.training, "none", init_device_mesh("cpu", (1,)))
    assert not model.has_dropout
    assert [(type(module), len(module._forward_hooks)) for module in model.lm.modules()] == before
