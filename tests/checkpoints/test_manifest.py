"""What `trainer.json` may say: of a checkpoint with a digest, what was written; of an older one, nothing that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame.checkpoints.manager import list_checkpoints
from flame.checkpoints.manifest import TRAINER_FILE, read_state
from tests.support.checkpoints import age, edit_state
from tests.support.runs import measured, read_metrics, run_here

State = dict[str, Any]


@pytest.fixture
def checkpoint(plain_run, tmp_path) -> Path:
    """A copy of a run's last checkpoint, of step 6."""
    copied = tmp_path / "run" / "checkpoint" / "step-6"
    shutil.copytree(plain_run / "checkpoint" / "step-6", copied)
    return copied


def put(value: object, *keys: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


def change_cursor(change: Callable[[list[int]], object]) -> Callable[[State], None]:
    def run(state: State) -> None:
        change(next(iter(state["data"]["sources"]["json"]["cursors"].values())))

    return run


IMPOSSIBLE: dict[str, tuple[Callable[[State], object], str]] = {
    "a step as text": (put("6", "step"), "step: Input should be a valid integer"),
    "half a step": (put(6.5, "step"), "step: Input should be a valid integer"),
    "a negative step": (put(-1, "step"), "step: Input should be greater than or equal to 0"),
    "another step": (put(8, "step"), "trainer.json is of step 8"),
    "a truth for a step": (put(True, "step"), "step: Input should be a valid integer"),
    "ranks as text": (put("two", "world_size"), "world_size: Input should be a valid integer"),
    "no ranks": (put(0, "world_size"), "world_size: Input should be greater than 0"),
    "a negative cursor": (change_cursor(lambda cursor: cursor.__setitem__(0, -1)), "cursors.stream-00000.0: Input should be"),
    "a short cursor": (change_cursor(lambda cursor: cursor.pop()), "cursors.stream-00000: List should have at least 4 items"),
    "a long cursor": (change_cursor(lambda cursor: cursor.append(0)), "cursors.stream-00000: List should have at most 4 items"),
    "a stream too many": (put([0, 0, 0, 0], "data", "sources", "json", "cursors", "stream-00012"), "there are 12 streams"),
    "no counters": (drop("counters"), "counters: Field required"),
    "a counter missing": (drop("counters", "skipped_in_a_row"), "counters.skipped_in_a_row: Field required"),
    "a source without position": (drop("data", "sources", "json"), "data.sources.json: Field required"),
    "a source without count": (drop("counters", "tokens_by_source", "json"), "counters.tokens_by_source.json: Field required"),
    "a negative counter": (put(-5, "counters", "tokens_seen"), "counters.tokens_seen: Input should be greater"),
    "no position": (drop("data", "next_sequence"), "data.next_sequence: Field required"),
    "options as a list": (put([1], "config", "training"), "config.training: Input should be a valid dictionary"),
    "no optimizer": (drop("config", "optimizer"), "config.optimizer: Field required"),
    "an objective as text": (put("future", "objective"), "objective: Input should be a valid dictionary"),
    "a file of no size": (put(-3, "files", ".metadata"), "files..metadata: Input should be greater"),
}


@pytest.mark.parametrize("lie", IMPOSSIBLE)
def test_a_value_that_cannot_be_is_damage(checkpoint, lie):
    """By the digest; without one, by what it is."""
    change, reason = IMPOSSIBLE[lie]
    kept = (checkpoint / TRAINER_FILE).read_bytes()
    state = json.loads(kept)
    change(state)
    (checkpoint / TRAINER_FILE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"has been changed since it was written \(digest\)"):
        read_state(checkpoint)
    (checkpoint / TRAINER_FILE).write_bytes(kept)
    edit_state(checkpoint, change)
    with pytest.raises(ValueError) as told:
        read_state(checkpoint)
    assert reason in str(told.value) and "\n" not in str(told.value)


def test_a_value_that_could_be_is_damage_by_its_digest(checkpoint):
    state = json.loads((checkpoint / TRAINER_FILE).read_text())
    state["counters"]["tokens_seen"] += 1
    (checkpoint / TRAINER_FILE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match="digest"):
        read_state(checkpoint)


def test_how_it_is_written_does_not_matter(checkpoint):
    state = json.loads((checkpoint / TRAINER_FILE).read_text())
    (checkpoint / TRAINER_FILE).write_text(json.dumps(dict(reversed(state.items()))))
    assert read_state(checkpoint) == state


def test_a_run_goes_on_from_an_older_checkpoint_and_past_one_that_lies(workspace, plain_run, tmp_path, caplog):
    """In two files of one run: the newest is impossible, the one before is of an older release."""
    run = tmp_path / "run"
    shutil.copytree(plain_run, run)
    edit_state(run / "checkpoint" / "step-6", put("6", "step"))
    age(run / "checkpoint" / "step-3")
    assert measured(run_here(workspace, run)) == measured(read_metrics(plain_run))
    assert "step-6 cannot be read and is passed over: ValueError: trainer.json: step: Input should be" in caplog.text
    assert "step-3 is of an older release, without digests" in caplog.text
    assert [path.name for path in list_checkpoints(run / "checkpoint")] == ["step-3", "step-6"]
    assert (run / "checkpoint" / "step-6.damaged").is_dir()
