"""Numbers that are not finite: what is skipped, what is told, and what must not be touched."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flame.checkpoints.files import list_checkpoints
from flame.errors import UserError
from flame.kernels.gradient_guard import guard_gradient
from flame.logging.counters import Counters
from flame.models.aux_loss import AuxLoss
from flame.models.mi_estimator import InfoNCEEstimator
from flame.models.wrapper import TrainingModel
from flame.objectives.schedule import WeightSchedule
from flame.objectives.step import Losses
from flame.runtime.distributed import get_rank, set_single_process_defaults
from flame.train import Trainer
from flame.trainer.guard import StepGuard
from flame.trainer.options import read_options
from tests.support.models import build_unsharded, future_config, random_batch, random_cu_seqlens
from tests.support.ranks import train_to_their_ends
from tests.support.runs import fork_ranks, options, read_metrics

CHANGES = {
    "training__steps": 3,
    "checkpoint__enable_checkpoint": False,
    "future_encoder__loss_weight": 0.5,
    "metrics__diagnostics_interval": 0,  # so that forwards are those of training
}


def run_trainer(kind: type[Trainer], workspace: Path, run: Path, **changes: object) -> Trainer:
    set_single_process_defaults()
    trainer = kind(read_options(options(workspace, run, **CHANGES | changes), 1))
    trainer.train()
    torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None
    return trainer


def copy_weights(trainer: Trainer, prefix: str) -> dict[str, Tensor]:
    named = trainer.model.named_parameters()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named if prefix in name}


class Snapshots(Trainer):
    """Keeps the weights after each step."""

    def train_step(self):
        super().train_step()
        self.backbones = [*getattr(self, "backbones", []), copy_weights(self, "lm.")]
        self.heads = [*getattr(self, "heads", []), copy_weights(self, "predictor.") | copy_weights(self, "estimator.")]


def break_summaries(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrainingModel.encode_future

    def encode(self, *args):
        summaries = real(self, *args)
        return summaries * float("nan") if trainer.step == 2 else summaries

    monkeypatch.setattr(TrainingModel, "encode_future", encode)


def break_one_summary(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinity in one component of one position, in every micro-step."""
    real = TrainingModel.encode_future

    def encode(self, *args):
        summaries = real(self, *args)
        if trainer.step == 2:
            summaries[30, 3] = float("inf")
        return summaries

    monkeypatch.setattr(TrainingModel, "encode_future", encode)


def break_estimator(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = InfoNCEEstimator.temperature
    monkeypatch.setattr(
        InfoNCEEstimator, "temperature", lambda self, like: real(self, like) * (float("nan") if trainer.step == 2 else 1.0)
    )


def break_predictor(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is fine and only the way back is not, as with an overflow: its NaN must stop at the hidden states."""

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    predictor = trainer.model.objective.predictor
    real = predictor.body.forward
    monkeypatch.setattr(predictor.body, "forward", lambda x: Poison.apply(real(x)) if trainer.step == 2 else real(x))


@pytest.mark.parametrize("fault", [break_summaries, break_one_summary, break_estimator, break_predictor])
def test_a_fault_on_the_future_side_leaves_the_backbone_training(workspace, tmp_path, monkeypatch, caplog, fault):
    """To the bit as in a run without the future loss in that step. Not clipped: a norm over more zeros is rounded otherwise."""
    changes = {"training__max_norm": 1e9}
    with monkeypatch.context() as patch:
        real = WeightSchedule.find_weight
        patch.setattr(WeightSchedule, "find_weight", lambda self, step: 0.0 if step == 2 else real(self, step))
        expected = run_trainer(Snapshots, workspace, tmp_path / "expected", **changes)

    class Broken(Snapshots):
        def _open_run(self):
            super()._open_run()
            fault(self, monkeypatch)

    caplog.clear()
    found = run_trainer(Broken, workspace, tmp_path / "found", **changes)
    for name, weight in expected.backbones[1].items():
        assert torch.equal(found.backbones[1][name], weight), name
    assert all(weight.isfinite().all() for weights in (found.heads[2], found.backbones[2]) for weight in weights.values())
    assert any(not torch.equal(found.heads[1][name], found.heads[2][name]) for name in found.heads[1])
    rows = read_metrics(tmp_path / "found")
    assert [row["skipped_aux"] for row in rows] == [0, 1, 1] and [row["skipped_steps"] for row in rows] == [0, 0, 0]
    assert ["ce_loss" in row for row in rows] == [True] * 3
    (told,) = [record.getMessage() for record in caplog.records if "future loss skipped" in record.getMessage()]
    assert told.startswith("step 2: the future loss, or a gradient of it, is not finite; sequence 2 (json: documents ")
    (line,) = (tmp_path / "found" / "skipped.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["step"], row["skipped"], [s["sequence"] for s in row["sequences"]]) == (2, "future loss", [2, 3])
    assert all(suspect["documents"] for suspect in row["sequences"])


def test_a_fault_of_a_baseline_is_reported_as_its(workspace, tmp_path, monkeypatch, caplog):
    class Broken(Trainer):
        def _open_run(self):
            super()._open_run()
            real = self.model.objective.head.forward

            def forward(*args):
                loss = real(*args)
                loss.register_hook(lambda grad: grad * (float("nan") if self.step == 2 else 1.0))
                return loss

            monkeypatch.setattr(self.model.objective.head, "forward", forward)

    other = {"future_encoder__learnable_temperature": None, "objective__name": "top"}
    run_trainer(Broken, workspace, tmp_path / "run", **other)
    (told,) = [record.getMessage() for record in caplog.records if record.getMessage().endswith("skipped")]
    assert told.startswith("step 2: the top loss, or a gradient of it, is not finite; ")
    assert told.endswith("top loss skipped")
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["skipped_steps"] == 0 and all(row["loss"] < 100 for row in rows)


def test_a_predictor_with_nan_gradients_is_not_updated(workspace, tmp_path, monkeypatch):
    class Broken(Snapshots):
        def _open_run(self):
            super()._open_run()
            break_predictor(self, monkeypatch)

    found = run_trainer(Broken, workspace, tmp_path / "run")
    assert all(torch.equal(found.heads[0][name], found.heads[1][name]) for name in found.heads[0])


def test_too_many_failures_of_the_future_loss_in_a_row_end_the_run(workspace, tmp_path, monkeypatch):
    real = TrainingModel.encode_future
    monkeypatch.setattr(TrainingModel, "encode_future", lambda *args: real(*args) * float("nan"))
    with pytest.raises(
        UserError, match=r"step 2: the future loss.*the last of training\.max_skipped_steps = 2 such steps in a row"
    ):
        run_trainer(Trainer, workspace, tmp_path / "run", training__max_skipped_steps=2)


def test_the_sequence_with_the_bad_loss_is_named(workspace, tmp_path, monkeypatch, caplog):
    """Of four micro-steps only the third is bad."""
    import flame.models.output_head

    real, calls = flame.models.output_head.linear_cross_entropy, []

    def cross_entropy(*args):
        calls.append(1)
        return real(*args) * (float("inf") if len(calls) == 7 else 1.0)

    monkeypatch.setattr(flame.models.output_head, "linear_cross_entropy", cross_entropy)
    run_trainer(Trainer, workspace, tmp_path / "run", training__gradient_accumulation_steps=4)
    (told,) = [record.getMessage() for record in caplog.records if "step skipped" in record.getMessage()]
    assert told.startswith("step 2: loss inf, gradient norm nan; sequence 6 (json: documents ") and "sequence 7" not in told
    rows = read_metrics(tmp_path / "run")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1] and [row["skipped_aux"] for row in rows] == [0, 0, 0]


def break_rank_1() -> None:
    """It loses the summaries of its sequences of step 2."""
    real, calls = TrainingModel.encode_future, []

    def encode(self, *args):
        calls.append(1)
        return real(self, *args) * (float("nan") if get_rank() == 1 and len(calls) in (3, 4) else 1.0)

    TrainingModel.encode_future = encode  # type: ignore[method-assign]


def test_a_fault_on_one_rank_is_told_by_all(workspace, tmp_path):
    """Rank 1's sequences of step 2 (5 and 7) lose their future loss; the others keep theirs, and both ranks go on together."""
    rows = fork_ranks(2, workspace, tmp_path / "run", break_rank_1, **CHANGES)
    assert [row["skipped_aux"] for row in rows] == [0, 1, 1] and all(row["aux_loss"] > 0 for row in rows)
    row = json.loads((tmp_path / "run" / "skipped.jsonl").read_text())
    assert [suspect["sequence"] for suspect in row["sequences"]] == [5, 7]


BREAKS_ON_ONE_RANK = """
from flame.data.sources.base import SourceKind
from flame.errors import UserError


class Shards:
    num_shards = 2

    def read_shard(self, shard, row):
        for number in range(row, 10**6):
            if shard == 1 and number == 80:
                raise UserError("shard 1 is broken after row 80")
            yield f"row {number} of shard {shard}"


class Breaking(SourceKind):
    name = "breaking"

    def open(self):
        return Shards()
"""


def test_data_that_are_wrong_on_one_rank_end_both_in_one_line_with_nothing_lost(workspace, tmp_path):
    (tmp_path / "breaking.py").write_text(BREAKS_ON_ONE_RANK)
    changes = {"training__dataset": tmp_path / "breaking.py", "training__num_streams": 2, "training__steps": 500}
    changes |= {"training__data_files": None, "metrics__log_freq": 1, "checkpoint__interval": 400}
    ended = train_to_their_ends(2, options(workspace, tmp_path / "run", **changes), tmp_path)
    assert ended == [(2, "shard 1 is broken after row 80\n")] * 2
    rows = read_metrics(tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoint")] == [f"step-{rows[-1]['step']}"]


def test_the_guard_passes_finite_gradients_and_stops_the_others():
    x = torch.randn(3, 2, requires_grad=True)
    (guard_gradient(x) * torch.tensor([1.0, 2.0])).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 2.0]] * 3))
    for bad in (float("nan"), float("inf")):
        x.grad = None
        (guard_gradient(x) * torch.tensor([1.0, bad])).sum().backward()
        assert torch.equal(x.grad, torch.zeros(3, 2))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("part", ["aux", "whole"])
def test_steps_without_the_objective_do_not_hide_that_it_always_fails(
    tmp_path: Path, one_process: None, every: int, part: str
) -> None:
    """It is what a NaN in an objective's loss leads to, which some report as failed and others do not."""
    model, batch, counters = build_unsharded(future_config()), random_batch(random_cu_seqlens(32, 3, 0)), Counters()
    guard, zero, stopped_at = StepGuard(3, tmp_path, model, counters, torch.device("cpu")), torch.zeros(()), None
    for step in range(1, 20):
        has_loss = step % every == 0
        aux = AuxLoss(zero, zero, torch.full((), float(part == "aux")), {}) if has_loss else None
        value = torch.tensor(math.nan if has_loss and part == "whole" else 1.0)
        outcomes = [Losses(torch.tensor(1.0), aux)]
        loss, failures = guard.reduce(value, outcomes)
        try:
            is_applied = guard.should_apply(step, loss, torch.tensor(1.0), failures, [batch], outcomes)
        except UserError:
            stopped_at = step
            break
        assert is_applied == (not has_loss or part == "aux")
    assert stopped_at == 3 * every


def test_a_good_step_with_the_objective_ends_its_streak(tmp_path: Path, one_process: None) -> None:
    model, batch, counters = build_unsharded(future_config()), random_batch(random_cu_seqlens(32, 3, 0)), Counters()
    guard, zero = StepGuard(2, tmp_path, model, counters, torch.device("cpu")), torch.zeros(())
    for step, (loss, failed) in enumerate([(math.nan, 0), (1.0, 0), (1.0, 1), (1.0, 0), (math.nan, 0), (1.0, 0)] * 3):
        outcomes = [Losses(torch.tensor(1.0), AuxLoss(zero, zero, torch.tensor(float(failed)), {}))]
        reduced, failures = guard.reduce(torch.tensor(loss), outcomes)
        guard.should_apply(step, reduced, torch.tensor(1.0), failures, [batch], outcomes)
    assert (counters.skipped_steps, counters.skipped_in_a_row) == (6, 0)
    assert (counters.skipped_aux, counters.skipped_aux_in_a_row) == (3, 0)
