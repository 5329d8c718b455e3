"""What a run does inside a step, and what it logs, against plain sums over captured micro-steps and a clock of its own."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.tensor import DTensor

import flame.models.output_head
import flame.train
from flame.data.prefetch import Prefetcher
from flame.logging import throughput
from flame.objectives.future.options import FutureOptions
from flame.objectives.step import Requested
from flame.runtime.distributed import set_single_process_defaults
from flame.train import Trainer, compute_losses
from flame.trainer import micro_step
from flame.trainer.options import read_options
from tests.support.models import build_unsharded, future_config, random_batch
from tests.support.runs import MICRO_STEPS, SEQ_LEN, options, read_metrics, run_here

T = TypeVar("T", bound=Trainer)


def build_trainer(kind: type[T], workspace: Path, run: Path, **changes: object) -> T:
    set_single_process_defaults()
    return kind(read_options(options(workspace, run, **changes), 1))


def gather(tensor: Tensor) -> Tensor:
    """A plain copy of a tensor that may be sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def test_summaries_see_the_window_only():
    """With future_k = 2 the aux loss is InfoNCE of summaries whose layers look at the next 2 tokens of the document."""
    config = future_config(future_k=2)
    model = build_unsharded(config).double()
    cu = torch.tensor([0, 9, 10, 17], dtype=torch.int32)
    batch = random_batch(cu)
    allowed = torch.zeros(1, 1, 17, 17, dtype=torch.bool)
    pairs = []
    for start, end in itertools.pairwise(cu.tolist()):
        for t in range(start, end):
            for key in (t + 1, t + 2):
                if key < end:
                    allowed[0, 0, t, key] = True
            if t + 1 < end:
                pairs.append((t, t + 1))

    found = model(compute_losses, batch, Requested(aux=True)).aux.loss_sum
    with torch.no_grad():
        places = torch.tensor([[*range(9), *range(1), *range(7)]])
        outputs = model.lm.base_model(input_ids=batch.input_ids, position_ids=places, attention_mask=allowed, use_cache=False)
        predictions = model.objective.predictor(model.encode_past(batch))
        x = torch.nn.functional.normalize(predictions[[t for t, _ in pairs]], dim=-1)
        y = torch.nn.functional.normalize(outputs.last_hidden_state[0, [u for _, u in pairs]], dim=-1)
        expected = torch.nn.functional.cross_entropy(x @ y.T / 0.1, torch.arange(len(pairs)), reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradients_are_clipped_and_the_norm_before_is_logged(workspace, tmp_path):
    class KeepsNorm(Trainer):
        def train_step(self):
            super().train_step()
            grads = [gather(p.grad) for p in self.model.parameters() if p.grad is not None]
            self.norm = sum(float(grad.double().square().sum()) for grad in grads) ** 0.5

    logged = []
    for max_norm in (1e-3, 1e6):
        run = tmp_path / f"{max_norm}"
        changes = {"training__max_norm": max_norm, "training__steps": 1, "checkpoint__enable_checkpoint": False}
        trainer = build_trainer(KeepsNorm, workspace, run, **changes)
        trainer.train()
        logged.append(read_metrics(run)[0]["grad_norm"])
        assert trainer.norm == pytest.approx(min(max_norm, logged[-1]), rel=1e-4)
    assert logged[0] == logged[1] > 1e-2


def test_a_skipped_step_changes_nothing(workspace, tmp_path, monkeypatch):
    snapshots = []

    class TakesSnapshots(Trainer):
        def train_step(self):
            super().train_step()
            weights = {name: gather(parameter) for name, parameter in self.model.named_parameters()}
            moments = {name: gather(value) for name, value in self.optimizer.state_dict().items() if isinstance(value, Tensor)}
            snapshots.append((weights, moments))

    run = tmp_path / "run"
    changes = {"training__steps": 3, "checkpoint__enable_checkpoint": False}
    trainer = build_trainer(TakesSnapshots, workspace, run, **changes)
    real = flame.models.output_head.linear_cross_entropy
    monkeypatch.setattr(
        flame.models.output_head, "linear_cross_entropy", lambda *args: real(*args) * (float("nan") if trainer.step == 2 else 1.0)
    )
    trainer.train()

    for first, second, third in zip(*snapshots, strict=True):
        assert len(first) > 10
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert all(third[name].isfinite().all() for name in third)
        assert any(not torch.equal(second[name], third[name]) for name in second)
    rows = read_metrics(run)
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]
    measured = {"loss", "ce_loss", "aux_loss", "grad_norm"}
    assert [measured & row.keys() for row in rows] == [measured, set(), measured]


@pytest.mark.parametrize("mode", ["none", "pointwise", "selective", "full"])
def test_activation_checkpointing_wraps_every_layer(workspace, tmp_path, mode):
    trainer = build_trainer(Trainer, workspace, tmp_path / "run", activation_checkpoint__mode=mode, training__compile=True)
    wrapped = [isinstance(layer, CheckpointWrapper) for layer in trainer.model.lm.get_submodule("model.layers").children()]
    assert wrapped == [mode != "none"] * 2


@pytest.mark.parametrize("mode", ["none", "pointwise", "selective", "full"])
def test_activation_checkpointing_wraps_the_layers_of_other_objectives(workspace, tmp_path, mode):
    changes = {"objective__name": "mtp", "mtp__tokens": 3}
    trainer = build_trainer(
        Trainer, workspace, tmp_path / "run", activation_checkpoint__mode=mode, training__compile=True, **changes
    )
    wrapped = [isinstance(head.layers[0], CheckpointWrapper) for head in trainer.model.objective.layers]
    assert wrapped == [mode != "none"] * 2


def test_a_run_says_what_has_no_effect(workspace, tmp_path, caplog):
    changes = {"training__steps": 1, "checkpoint__enable_checkpoint": False, "future_predictor__dropout": 0.1}
    changes["checkpoint__export_hf"] = None
    run_here(workspace, tmp_path / "top", objective__name="top", **changes)
    (told,) = [line for line in caplog.messages if "without effect" in line]
    assert told.endswith(": checkpoint.interval, future_encoder.learnable_temperature, future_predictor.dropout")
    caplog.clear()
    run_here(workspace, tmp_path / "future", objective__warmup_steps=2, **changes)
    assert "loss_weight = 0.03 is not reached" in caplog.text
    assert [line for line in caplog.messages if "without" in line] == ["without effect in this run: checkpoint.interval"]


def test_logged_losses_are_means_over_the_items_of_all_micro_steps(workspace, tmp_path, monkeypatch):
    captured = []

    def capture(model, batch, *args):
        losses = compute_losses(model, batch, *args)
        assert losses.ce_sum is not None and losses.aux is not None
        segments = batch.segment_ids[0]
        counts = {"labels": int((batch.labels != -100).sum()), "anchors": int((segments[2:] == segments[:-2]).sum())}
        measures = {name: total for name, (total, _) in losses.aux.measures.items()}
        terms = {"ce_sum": losses.ce_sum, "loss_sum": losses.aux.loss_sum} | measures
        captured.append(counts | {name: term.item() for name, term in terms.items()})
        return losses

    monkeypatch.setattr(micro_step, "compute_losses", capture)
    chooser = random.Random(0)
    texts = ["".join(chooser.choices("abcdef", k=length)) for length in [1] * 100 + [150] * 6]  # packs with few pieces and many
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    steps = 3
    changes = {
        "training__data_files": tmp_path / "mixed.jsonl",
        "training__num_streams": MICRO_STEPS,
        "training__steps": steps,
        "metrics__log_freq": steps,
        "checkpoint__enable_checkpoint": False,
        "future_encoder__target_shift": 2,  # so that there are fewer anchors than labels
        "future_encoder__temperature": 0.25,
    }
    (row,) = run_here(workspace, tmp_path / "run", **changes)

    by_step = [captured[first : first + MICRO_STEPS] for first in range(0, len(captured), MICRO_STEPS)]
    assert len(by_step) == steps
    for name in ("labels", "anchors"):
        assert max(m[name] for m in captured) > 1.2 * min(m[name] for m in captured) > 0

    def total(name: str, micro_steps: list[dict[str, float]] = captured) -> float:
        return sum(micro_step[name] for micro_step in micro_steps)

    expected = {
        "ce_loss": total("ce_sum") / total("labels"),
        "aux_loss": total("loss_sum") / total("anchors"),
        "mi_lower_bound": total("mi_lower_bound") / total("anchors"),
        "infonce_accuracy": total("infonce_accuracy") / total("anchors"),
        "positive_cosine": total("positive_cosine") / total("anchors"),
        "negative_cosine": total("negative_cosine") / total("anchors"),
        "anchors": total("anchors") / steps,
    }
    assert len({round(value, 6) for value in expected.values()} | {0.0}) == len(expected) + 1  # each tells its own field
    losses = [
        total("ce_sum", s) / total("labels", s) + FutureOptions().loss_weight * total("loss_sum", s) / total("anchors", s)
        for s in by_step
    ]
    expected["loss"] = sum(losses) / steps
    print([(m["labels"], m["anchors"]) for m in captured], expected)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_the_temperature_is_logged_as_a_temperature(workspace, tmp_path, learned):
    changes = {"future_encoder__temperature": 0.25, "optimizer__lr": 1e-3, "training__steps": 1}
    changes["future_encoder__learnable_temperature"] = learned
    (row,) = run_here(workspace, tmp_path / "run", **changes, checkpoint__enable_checkpoint=False)
    assert row["temperature"] == pytest.approx(0.25, rel=0.01 if learned else 1e-6)


@pytest.mark.parametrize("log_freq", [1, 2])
def test_speed_and_data_wait(workspace, tmp_path, monkeypatch, log_freq):
    """On a clock where a batch takes 0.25 s to arrive and 1 s to compute."""
    now = 0.0

    def taking(seconds: float, inner: Callable) -> Callable:
        def run(*args):
            nonlocal now
            now += seconds
            return inner(*args)

        return run

    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Prefetcher, "take", taking(MICRO_STEPS * 0.25, Prefetcher.take))
    monkeypatch.setattr(micro_step, "compute_losses", taking(1.0, compute_losses))
    changes = {"metrics__log_freq": log_freq, "training__steps": 4, "checkpoint__enable_checkpoint": False}
    rows = run_here(workspace, tmp_path / "run", **changes)

    expected = {
        "step_seconds": MICRO_STEPS * 1.25,
        "tokens_per_second": SEQ_LEN / 1.25,
        "data_wait_seconds": log_freq * MICRO_STEPS * 0.25,
        "data_wait_fraction": 0.2,
    }
    assert len(rows) == 4 // log_freq
    for row in rows:
        assert {name: row[name] for name in expected} == pytest.approx(expected)
