"""Which steps and packed sequences have the objective's loss, against plain loops and captured steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.data.batch import PackedBatch
from flame.models.flops import ModelFlops
from flame.objectives.cadence import Cadence, LossPlan
from flame.objectives.future.objective import FutureObjective
from flame.objectives.probe import is_probe_step
from flame.objectives.schedule import WeightSchedule
from flame.runtime.distributed import set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options
from flame.trainer.setup import build_modules
from tests.support.models import build_unsharded, future_config, get_own, random_batch, random_cu_seqlens, tiny_llama
from tests.support.runs import cut_power_after, final_weights, fork_ranks, measured, options, read_metrics, run_here

WITHOUT_SAVING = {"checkpoint__enable_checkpoint": False, "metrics__diagnostics_interval": 0}
FOUR = {"training__gradient_accumulation_steps": 4}
EVERY_SECOND = {"future_encoder__every": 2, "future_encoder__draw_step": True, "future_encoder__sequence_share": 0.5} | FOUR


def list_sequences(cadence: Cadence, step: int) -> set[int]:
    """Numbers, within their step, of the packed sequences that have the loss."""
    marked = cadence.mark_micro_steps(step)
    return {i * cadence.ranks + rank for i, has_loss in enumerate(marked) if has_loss for rank in range(cadence.ranks)}


@given(st.integers(1, 12), st.booleans(), st.integers(0, 2**31 - 1))
def test_one_step_of_each_group_has_the_loss(every, is_drawn, seed):
    cadence = Cadence(every, is_drawn, seed)
    steps = [step for step in range(1, 20 * every + 1) if cadence.has_loss(step)]
    assert [(step - 1) // every for step in steps] == list(range(20))
    if not is_drawn:
        assert all(step % every == 0 for step in steps)


def test_the_drawn_step_is_any_of_them():
    places = {(step - 1) % 4 for step in range(1, 401) if Cadence(4, True, 3).has_loss(step)}
    assert places == set(range(4))


@given(st.integers(1, 5), st.data())
def test_sequences_are_the_same_on_any_number_of_ranks_and_take_turns(every, data):
    total = data.draw(st.sampled_from([1, 2, 4, 6, 8, 12]))
    chosen = data.draw(st.integers(1, total))
    alone = Cadence(every, num_sequences=total, num_chosen=chosen)
    steps = [step for step in range(1, total * every + 1) if alone.has_loss(step)]
    turns = [each for number in range(total) for each in range(number * chosen, (number + 1) * chosen)]
    for number, step in enumerate(steps):
        expected = {each % total for each in turns[number * chosen : (number + 1) * chosen]}
        for ranks in (ranks for ranks in range(1, total + 1) if total % ranks == 0 and chosen % ranks == 0):
            assert list_sequences(alone._replace(ranks=ranks), step) == expected
    counts = [sum(sequence in list_sequences(alone, step) for step in steps) for sequence in range(total)]
    assert set(counts) == {chosen}


@given(st.integers(1, 6), st.booleans(), st.integers(0, 99), st.integers(0, 15), st.integers(0, 9))
def test_diagnostics_come_with_the_first_loss_after_each_interval(every, is_drawn, seed, start_step, interval):
    cadence = Cadence(every, is_drawn, seed, start_step=start_step)
    due, expected = 0, []
    for step in range(1, 60):
        if cadence.has_loss(step) and interval and (not expected or step >= due):
            expected.append(step)
            due = (step // interval + 1) * interval
    assert [step for step in range(1, 60) if is_probe_step(step, interval, cadence)] == expected


def test_the_mean_weight_is_kept_if_asked():
    schedule = WeightSchedule(0.5, start_step=3, warmup_steps=4, decay_steps=0, total_steps=100)
    cadence = Cadence(3, num_sequences=4, num_chosen=2, start_step=3)
    plain, kept = LossPlan(schedule, cadence), LossPlan(schedule, cadence._replace(keeps_mean_weight=True))
    assert [plain.decide(step)[0] for step in (1, 2, 3, 4, 5, 6, 9)] == [0, 0, 0.125, 0, 0, 0.5, 0.5]
    assert [kept.decide(step)[0] for step in (3, 6)] == [0.375, 1.5]
    assert plain.decide(4)[1] == [False] * 4 and sum(plain.decide(3)[1]) == 2


# ---------------------------------------------------------------- in the trainer


class SeesPasses(Trainer):
    """Keeps the numbers of the packed sequences whose summaries each step has asked for."""

    def train_step(self):
        real, seen = FutureObjective.summarize, set()

        def spy(objective: FutureObjective, backbone, batch: PackedBatch):
            seen.add(batch.sequence_index)
            return real(objective, backbone, batch)

        FutureObjective.summarize = spy
        try:
            super().train_step()
        finally:
            FutureObjective.summarize = real
        self.passes = [*getattr(self, "passes", []), seen]


def see_passes(workspace: Path, run: Path, **changes: object) -> tuple[list[set[int]], list[dict]]:
    set_single_process_defaults()
    trainer = SeesPasses(read_options(options(workspace, run, **WITHOUT_SAVING | changes), 1))
    trainer.train()
    return trainer.passes, read_metrics(run)


@pytest.mark.parametrize("negatives", ["local", "global"])
def test_what_has_no_loss_costs_no_pass_and_no_flops(workspace, tmp_path, negatives):
    changes = FOUR | {"training__steps": 4, "future_encoder__negatives": negatives, "future_predictor__dropout": 0.0}
    passes, rows = see_passes(workspace, tmp_path / "half", **changes | EVERY_SECOND | {"future_encoder__draw_step": False})
    assert passes == [set(), {4, 5}, set(), {14, 15}]
    assert ["aux_loss" in row for row in rows] == [False, True, False, True]
    assert [row.get("loss_weight") for row in rows] == [None, 0.03, None, 0.03]
    every_row = run_here(workspace, tmp_path / "all", **changes, **WITHOUT_SAVING)
    plain = run_here(workspace, tmp_path / "plain", **changes, **WITHOUT_SAVING, objective__name="next_token")
    assert 0.3 < rows[1]["anchors"] / every_row[1]["anchors"] < 0.7
    for half, whole, without in zip(rows, every_row, plain, strict=True):
        added, most = half["step_tflops"] - without["step_tflops"], whole["step_tflops"] - without["step_tflops"]
        if "aux_loss" in half:
            assert 0.3 < added / most < 0.6
        else:
            assert added == 0 < most


def test_global_negatives_are_counted_from_the_sequences_with_the_loss():
    config = future_config(negatives="global", sequence_share=0.5)
    config.training.gradient_accumulation_steps = 4
    objective = get_own(build_modules(config, tiny_llama(), "cpu"))
    batch = random_batch(random_cu_seqlens(40, 3, seed=1))
    anchors, flops = objective.count(batch), ModelFlops(build_unsharded(config).lm)
    compared = objective.count_flops(batch, flops).heads - 6 * 40 * sum(
        p.numel() for p in objective.predictor.parameters() if p.ndim > 1
    )
    assert compared == 4 * anchors * (2 * anchors) * 32


def test_the_loss_is_the_mean_over_its_sequences(workspace, tmp_path):
    """Half of the sequences give the loss of a step that has no others, and leave the cross entropy as it is."""
    changes = {"training__steps": 1, "future_predictor__dropout": 0.0}
    (half,) = run_here(workspace, tmp_path / "half", future_encoder__sequence_share=0.5, **FOUR, **changes, **WITHOUT_SAVING)
    (whole,) = run_here(workspace, tmp_path / "whole", **FOUR, **changes, **WITHOUT_SAVING)
    (first,) = run_here(workspace, tmp_path / "first", training__gradient_accumulation_steps=2, **changes, **WITHOUT_SAVING)
    assert half["ce_loss"] == whole["ce_loss"] != first["ce_loss"]
    assert half["aux_loss"] == pytest.approx(first["aux_loss"], rel=1e-6) and half["anchors"] == first["anchors"]
    assert half["loss"] == pytest.approx(half["ce_loss"] + 0.03 * half["aux_loss"], rel=1e-6)


def test_steps_without_the_loss_train_on_the_next_token_alone(workspace, tmp_path):
    """Until the first of them, a run is next-token training to the bit."""
    changes = {"training__steps": 3}
    plain = run_here(workspace, tmp_path / "plain", objective__name="next_token", **changes)
    skipping = run_here(workspace, tmp_path / "run", future_encoder__every=3, **changes)
    names = ("ce_loss", "grad_norm")
    assert [[row[name] for name in names] for row in plain[:2]] == [[row[name] for name in names] for row in skipping[:2]]
    assert skipping[2]["ce_loss"] == plain[2]["ce_loss"] and skipping[2]["loss"] > plain[2]["loss"]


def test_an_interrupted_run_chooses_the_same(workspace, tmp_path):
    argv = options(workspace, tmp_path / "run", **EVERY_SECOND)
    whole = run_here(workspace, tmp_path / "whole", **EVERY_SECOND)
    cut_power_after(4, argv)
    assert measured(run_here(workspace, tmp_path / "run", **EVERY_SECOND)) == measured(whole)
    found, expected = final_weights(tmp_path / "run"), final_weights(tmp_path / "whole")
    assert all((found[name] == expected[name]).all() for name in expected)


@pytest.mark.slow
def test_two_ranks_choose_the_same(workspace, tmp_path):
    changes = EVERY_SECOND | {"training__steps": 4, "future_encoder__negatives": "global"}
    alone = run_here(workspace, tmp_path / "alone", **changes, **WITHOUT_SAVING)
    halves = changes | {"training__gradient_accumulation_steps": 2}
    two = fork_ranks(2, workspace, tmp_path / "two", **halves, **WITHOUT_SAVING)
    for found, expected in zip(measured(two), measured(alone), strict=True):
        assert found == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"future_encoder__sequence_share": 0.3},
            "future_encoder.sequence_share = 0.3 of 4 packed sequences a step is no multiple of the ranks, 1: with "
            "training.gradient_accumulation_steps = 4 allowed is 0.25, 0.5, 0.75, 1; to skip whole steps set "
            "future_encoder.every",
        ),
        ({"future_encoder__sequence_share": 0.0}, "future_encoder.sequence_share = 0.0"),
        ({"future_encoder__every": 0}, "future_encoder.every = 0"),
        (
            {"future_encoder__every": 2, "experimental__freeze_lm_for_infonce": True},
            "future_encoder.every = 2 beside experimental.freeze_lm_for_infonce = true leaves nothing to train",
        ),
        ({"objective__name": "mtp", "mtp__sequence_share": 0.1}, "mtp.sequence_share = 0.1 of 4 packed sequences"),
    ],
)
def test_what_cannot_be_chosen_is_told(workspace, tmp_path, capsys, changes, expected):
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, tmp_path / "run", **FOUR, **changes)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith(expected) and "\n" not in error


@given(st.integers(1, 9), st.booleans(), st.integers(0, 99), st.integers(0, 30))
def test_the_first_step_with_a_loss(every, is_drawn, seed, start_step):
    cadence = Cadence(every, is_drawn, seed, start_step=start_step)
    assert cadence.find_first() == next(step for step in range(1, 60) if cadence.has_loss(step))


@pytest.mark.parametrize("changes", [{"future_encoder__every": 9}, {"objective__start_step": 9}])
def test_a_run_without_any_loss_is_told(workspace, tmp_path, caplog, changes):
    rows = run_here(workspace, tmp_path / "run", training__steps=2, **changes, **WITHOUT_SAVING)
    assert not any("aux_loss" in row for row in rows)
    assert any(line.startswith("no step of this run has the objective's loss: the first would be 9") for line in caplog.messages)


def test_the_start_says_it(workspace, tmp_path, caplog):
    run_here(workspace, tmp_path / "run", training__steps=2, **EVERY_SECOND, **WITHOUT_SAVING)
    told = " on in one step of 2, on 2 of a step's 4 packed sequences"
    assert any("loss_weight 0.03 from step " in line and line.endswith(told) for line in caplog.messages)
    run_here(workspace, tmp_path / "all", training__steps=1, future_encoder__keep_mean_weight=True, **WITHOUT_SAVING)
    assert any("without effect" in line and "future_encoder.keep_mean_weight" in line for line in caplog.messages)
