"""Seconds as steps: what fits, and that an arm is timed once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.compare import probe
from flame.compare.devices import Slot
from flame.compare.probe import FAR_AWAY, count_steps, set_steps
from flame.compare.runs import Run, list_runs, read_spec, resolve
from flame.compare.spec import Options
from tests.support.comparisons import write_spec

SLOTS = [Slot(("0",), 1), Slot(("1",), 1), Slot(("0",), 1), Slot(("1",), 1)]


@given(tenths=st.integers(0, 400), start_step=st.integers(0, 30), before=st.integers(1, 9), later=st.integers(1, 9))
def test_as_many_steps_as_fit(tenths: int, start_step: int, before: int, later: int):
    """Against a loop, in whole tenths of a second."""
    steps, spent = 0, 0
    while (spent := spent + (before if steps + 1 < start_step else later)) <= tenths:
        steps += 1
    assert count_steps(tenths, start_step, before, later) == max(1, steps)


def test_an_arm_is_timed_once_and_again_when_it_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    timed: list[tuple[str, int]] = []

    def time_steps(run: Run, folder: Path, slots: list[Slot], changes: Options) -> float:
        timed.append((run.arm, changes["objective.start_step"]))
        return {FAR_AWAY: 0.5}.get(changes["objective.start_step"], 2.0)

    monkeypatch.setattr(probe, "_time_steps", time_steps)
    path = write_spec(tmp_path, old="tokens = 20_000", new="seconds = 60")
    late = Path(path).read_text().replace("[arms.future]", "[arms.future]\nobjective.start_step = 21")
    Path(path).write_text(late)
    spec = read_spec(path)
    assert {run.steps for run in set_steps(spec, list_runs(spec), SLOTS, may_measure=False)} == {None}
    runs = set_steps(spec, list_runs(spec), SLOTS)
    assert {(run.arm, run.steps) for run in runs} == {("next_token", 30), ("mtp", 30), ("future", 45)}
    assert resolve(runs[0]).training.steps == 30
    assert sorted(timed) == [("future", 0), ("future", FAR_AWAY), ("mtp", 0), ("next_token", 0)]
    assert set_steps(spec, list_runs(spec), SLOTS) == runs and len(timed) == 4
    Path(path).write_text(late.replace('name = "mtp"', 'name = "mtp"\nmtp.tokens = 2').replace("[1, 2, 3]", "[5, 6]"))
    other = read_spec(path)
    assert len(set_steps(other, list_runs(other), SLOTS)) == 6 and timed[4:] == [("mtp", 0)]


def test_as_many_runs_share_a_device_as_later():
    assert probe._share_device(SLOTS) == [SLOTS[0], SLOTS[2]]
