"""Seconds as steps: what fits, and that an arm is timed once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.compare import probe
from flame.compare.devices import Slot
from flame.compare.probe import FAR_AWAY, StepTimes, count_steps, set_steps
from flame.compare.runs import Run, list_runs, read_spec, resolve
from flame.compare.spec import Options
from flame.errors import UserError
from flame.objectives.cadence import Cadence
from tests.support.comparisons import write_spec
from tests.support.paths import REPO
from tests.support.refusals import expect_one_line

SLOTS = [Slot(("0",), 1), Slot(("1",), 1), Slot(("0",), 1), Slot(("1",), 1)]


@given(seconds=st.integers(1, 3000), every=st.integers(1, 9), start_step=st.integers(0, 60))
def test_seconds_are_those_of_the_steps_of_a_cadence(seconds: int, every: int, start_step: int):
    """Against the trainer's own choice of steps, up to the part of one `every` that is left at either end."""
    cadence = Cadence(every=every, start_step=start_step)
    plain, with_loss = 2.0, 7.0
    steps = count_steps(seconds, start_step, plain, StepTimes(with_loss, plain).find_mean(every))
    spent = sum(with_loss if cadence.has_loss(step) else plain for step in range(1, steps + 1))
    assert abs(spent - seconds) <= with_loss + 2 * (with_loss - plain) or steps == 1


@given(tenths=st.integers(0, 400), start_step=st.integers(0, 30), before=st.integers(1, 9), later=st.integers(1, 9))
def test_as_many_steps_as_fit(tenths: int, start_step: int, before: int, later: int):
    """Against a loop, in whole tenths of a second."""
    steps, spent = 0, 0
    while (spent := spent + (before if steps + 1 < start_step else later)) <= tenths:
        steps += 1
    assert count_steps(tenths, start_step, before, later) == max(1, steps)


def test_an_arm_is_timed_once_and_again_when_it_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    timed: list[tuple[str, int]] = []
    frequent: list[tuple[str, int]] = []

    def time_steps(run: Run, folder: Path, slots: list[Slot], changes: Options) -> float:
        timed.append((run.arm, changes["objective.start_step"]))
        frequent.extend((run.arm, value) for key, value in changes.items() if key.endswith(".every"))
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
    Path(path).write_text(late.replace('name = "mtp"', 'name = "mtp"\nmtp.every = 5'))
    spec = read_spec(path)
    frequent.clear()
    # A step of five takes 2 s, the others 0.5 s: 0.8 s on average.
    assert {run.steps for run in set_steps(spec, list_runs(spec), SLOTS) if run.arm == "mtp"} == {75}
    assert timed[5:] == [("mtp", FAR_AWAY), ("mtp", 0)] and frequent == [("mtp", 1), ("mtp", 1)]


def make_steps(first: int, fraction: float, seconds: float = 3.0):
    """Steps of a probe: so many launched one by one, which take 3 s, then others, with their share of CUDA graphs."""
    launched = [{"step_seconds": 3.0, "cuda_graph_fraction": 0.0}] * first
    later = {"step_seconds": seconds, "cuda_graph_fraction": fraction}
    return lambda steps: [*launched, *[later] * (steps - 4 - first)][: steps - 4]


@pytest.mark.parametrize(
    ("draw", "lengths", "expected"),
    [
        (lambda steps: [{"step_seconds": 3.0}] * (steps - 4), [12], 3.0),
        (make_steps(0, 1.0, 1.0), [12, 48], 1.0),
        (make_steps(9, 1.0, 1.0), [12, 48], 1.0),
        (make_steps(40, 1.0, 1.0), [12, 48, 192], 1.0),
        (make_steps(0, 0.5, 2.0), [12, 48, 192], 2.0),
        (make_steps(0, 0.0), [12, 48], 3.0),
    ],
)
def test_where_there_are_graphs_steps_are_timed_once_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw, lengths, expected
):
    """The first of each kind are launched one by one. Where graphs are left out for good, no longer probe is made."""
    tried: list[int] = []

    def run_steps(*given: object) -> list[list[dict[str, float]]]:
        tried.append(given[-1])
        return [draw(given[-1])] * 2

    monkeypatch.setattr(probe, "_run_steps", run_steps)
    spec = read_spec(write_spec(tmp_path))
    assert probe._time_steps(list_runs(spec)[0], tmp_path, SLOTS, {}) == expected and tried == lengths


def test_steps_are_not_timed_under_changing_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run.toml").write_text(text := (REPO / "configs/pathstar_cpu.toml").read_text())
    path = Path(write_spec(tmp_path, old="tokens = 20_000", new="seconds = 60"))
    path.write_text(path.read_text().replace(f"{REPO}/configs/pathstar_cpu.toml", f"{tmp_path}/run.toml"))
    spec = read_spec(str(path))

    def time_steps(run: Run, folder: Path, slots: list[Slot], changes: Options) -> float:
        if run.arm == "future":
            (tmp_path / "run.toml").write_text(text.replace("lr = 3e-3", "lr = 0.5"))
        return 1.0

    monkeypatch.setattr(probe, "_time_steps", time_steps)
    with pytest.raises(UserError) as caught:
        set_steps(spec, list_runs(spec), SLOTS)
    expect_one_line(caught.value, "graphs/", "changed while", "repeat the command")


def test_as_many_runs_share_a_device_as_later():
    assert probe._share_device(SLOTS) == [SLOTS[0], SLOTS[2]]
