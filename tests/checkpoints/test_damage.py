"""Whatever is broken in the newest checkpoint, the one before it is used; and what is read cannot run code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata as metadata_module

from flame.checkpoints import manager as checkpoint
from flame.checkpoints.manager import TRAINER_FILE
from flame.checkpoints.storage import TensorReader
from flame.errors import UserError
from flame.runtime.agreement import RankFailure
from flame.weights.tensors import read_model_tensors
from tests.support.checkpoints import Case, assert_equal, build_case, expected


@pytest.fixture(autouse=True)
def in_group(group) -> None:
    """Each test is a process group of its own."""


SHARD, INDEX = "__0_0.distcp", ".metadata"


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def garble(name: str) -> Callable[[Path], object]:
    """Other bytes, as many as before."""
    return lambda folder: (folder / name).write_bytes(b"\x93" * (folder / name).stat().st_size)


def delete(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def flip_weights(folder: Path) -> None:
    """One bit within the values of one tensor, where loading alone does not see it."""
    content = bytearray((folder / SHARD).read_bytes())
    place = content.index(expected(2)["model.table"].numpy().tobytes())
    content[place + 5] ^= 1
    (folder / SHARD).write_bytes(content)


def relist(folder: Path) -> None:
    """Make the listed size of the index its size, so that it is read."""
    state = json.loads((folder / TRAINER_FILE).read_text())
    state["files"][INDEX] = (folder / INDEX).stat().st_size
    (folder / TRAINER_FILE).write_text(json.dumps(state))


def replace_index(content: bytes) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / INDEX).write_bytes(content)
        relist(folder)

    return replace


def cut_index(folder: Path) -> None:
    cut(INDEX)(folder)
    relist(folder)


def forget(*keys: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = TensorReader(folder).read_metadata()
        for key in keys:
            del index.state_dict_metadata[key]
        replace_index(pickle.dumps(index))(folder)

    return change


def reshape(folder: Path) -> None:
    index = TensorReader(folder).read_metadata()
    index.state_dict_metadata["model.table"].size = torch.Size([9, 3])  # type: ignore[union-attr]
    replace_index(pickle.dumps(index))(folder)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (delete(SHARD), f"No such file or directory: '.*{SHARD}'"),
    "truncated shard": (cut(SHARD), rf"{SHARD} has \d+ bytes instead of \d+"),
    "garbled shard": (garble(SHARD), f"{SHARD}: the bytes of .* are damaged"),
    "flipped bit": (flip_weights, f"{SHARD}: the bytes of model.table are damaged"),
    "missing asset": (delete("hf/config.json"), "No such file or directory: '.*config.json'"),
    "missing index": (delete(INDEX), "is incomplete, without .metadata, and"),
    "garbled index": (garble(INDEX), ".metadata cannot be read"),
    "torn index": (cut_index, ".metadata cannot be read"),
    "empty index": (replace_index(b""), ".metadata cannot be read"),
    "other pickle": (replace_index(pickle.dumps({"a": 1})), ".metadata holds no index"),
    "missing state": (delete(TRAINER_FILE), f"is incomplete, without {TRAINER_FILE}, and"),
    "torn state": (cut(TRAINER_FILE), f"{TRAINER_FILE}: Expecting"),
    "empty state": (write(TRAINER_FILE, ""), f"{TRAINER_FILE}: Expecting value"),
    "binary state": (write(TRAINER_FILE, b"\xff\xfe\x00"), f"{TRAINER_FILE}: .*decode"),
    "other state": (write(TRAINER_FILE, '{"step": 2}'), f"{TRAINER_FILE} lacks"),
    "missing tensors": (forget("model.bias", "optimizer.state.step"), "it has no tensor model.bias and lacks 1 more"),
    "other shape": (reshape, r"its tensor model.table has the shape \[9, 3\], this run's has \[7, 3\]"),
}


@pytest.fixture
def case(tmp_path) -> Case:
    """A run with two checkpoints, whose tensors have changed since."""
    case = build_case(tmp_path)
    for step in (1, 2):
        case.fill(step)
        case.save(step)
    case.fill(9)
    return case


def test_without_damage_the_newest_is_used(case, caplog):
    assert case.load() == 2
    assert_equal(case.full(), expected(2))
    assert not caplog.records


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(case, tmp_path, caplog, damage):
    inflict, reason = DAMAGES[damage]
    inflict(tmp_path / "step-2")
    assert case.load() == 1
    assert_equal(case.full(), expected(1))
    record, aside = caplog.records
    assert aside.getMessage().endswith("step-2 is set aside as step-2.damaged") and (tmp_path / "step-2.damaged").is_dir()
    message = record.getMessage()
    assert "\n" not in message and f"checkpoint {tmp_path / 'step-2'} " in message and "passed over" in message
    assert re.search(reason, message), message


def test_where_none_can_be_read_the_run_does_not_start_over(case, tmp_path):
    delete(SHARD)(tmp_path / "step-1")
    delete(INDEX)(tmp_path / "step-2")
    with pytest.raises(UserError, match=f'none of the 2 checkpoints in "{tmp_path}" can be read'):
        case.load()


def test_without_checkpoints_there_is_nothing_to_load(tmp_path):
    case = build_case(tmp_path / "none")
    assert case.load() is None


def test_a_refusal_is_no_damage(case):
    """The checkpoint before it is not tried, and no tensor is touched."""

    def refuse(state):
        raise UserError(f"not step {state['step']}", "nor its seed")

    with pytest.raises(UserError) as error:
        case.checkpointer.load_latest(refuse)
    assert error.value.lines == ["not step 2", "nor its seed"]
    assert_equal(case.full(), expected(9))


class Attack:
    def __init__(self, call: Callable, *arguments: object):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_an_index_cannot_run_code(case, tmp_path, caplog):
    """Neither while a run resumes nor while a checkpoint is converted; not even beside what an index consists of."""
    trace = tmp_path / "trace"
    index = TensorReader(tmp_path / "step-2").read_metadata()
    index.planner_data = {"model.table": Attack(os.mkdir, str(trace))}
    for content in (pickle.dumps(Attack(os.mkdir, str(trace))), pickle.dumps(index), pickle.dumps(Attack(eval, "1"))):
        replace_index(content)(tmp_path / "step-2")
        assert case.load() == 1
        assert "it asks for" in caplog.text
        (tmp_path / "step-2.damaged").rename(tmp_path / "step-2")
        with pytest.raises(UserError, match=r"is damaged: .metadata cannot be read: it asks for"):
            read_model_tensors(tmp_path / "step-2")
        assert not trace.exists()
        caplog.clear()
    pickle.loads(pickle.dumps(index))
    assert trace.exists()  # the attack is a real one


@pytest.mark.parametrize("name", ["load", "_utils._rebuild_tensor", "hub.load", "nn.Linear", "device"])
def test_only_single_names_of_torch_are_allowed(tmp_path, name):
    """Protocol 4 takes dotted names, which reach anything that a module has imported."""
    pickled = b"\x80\x04\x8c\x05torch" + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    assert pickle.loads(pickled) is not None
    (tmp_path / INDEX).write_bytes(pickled)
    with pytest.raises(ValueError, match="it asks for"):
        TensorReader(tmp_path).read_metadata()


@pytest.mark.parametrize("fault", [MemoryError("no memory"), OSError(errno.EMFILE, "Too many open files")])
def test_a_fault_of_the_machine_is_no_damage(case, tmp_path, monkeypatch, fault):
    """The checkpoint may be good: going back to the one before would drop it, and take it up again at the next start."""

    def fail(*args, **kwargs):
        raise fault

    monkeypatch.setattr(checkpoint, "verify_tensors", fail)
    with pytest.raises(RankFailure, match=r"no memory|Too many open files"):
        case.load()
    assert (tmp_path / "step-2").is_dir() and not (tmp_path / "step-2.damaged").exists()
    monkeypatch.undo()
    assert case.load() == 2


class Reached:
    """An index that reaches for an attribute, as an enumeration's member is named by some releases of Python."""

    def __init__(self, owner: object, name: str):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_attributes_are_only_members_of_an_enumeration(tmp_path):
    index = TensorReader(build_case_with_checkpoint(tmp_path)).read_metadata()
    member = metadata_module._MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    index.planner_data = Reached(type(member), member.name)
    (tmp_path / "step-1" / ".metadata").write_bytes(pickle.dumps(index))
    assert TensorReader(tmp_path / "step-1").read_metadata().planner_data is member
    for owner, name in ((type(member), "__init__"), (torch.Size, "__subclasses__"), (type(index), "__init__")):
        index.planner_data = Reached(owner, name)
        (tmp_path / "step-1" / ".metadata").write_bytes(pickle.dumps(index))
        with pytest.raises(ValueError, match="it asks for an attribute"):
            TensorReader(tmp_path / "step-1").read_metadata()


def build_case_with_checkpoint(folder: Path) -> Path:
    case = build_case(folder)
    case.save(1)
    return folder / "step-1"
