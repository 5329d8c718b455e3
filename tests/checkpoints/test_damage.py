"""Whatever is broken in the newest checkpoint, the one before it is used; and what is read cannot run code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata as metadata_module

from flame.checkpoints import manager as checkpoint
from flame.checkpoints.manifest import DIGESTS, OWN_DIGEST, TRAINER_FILE, read_state, verify_files
from flame.checkpoints.storage import TensorReader
from flame.errors import UserError
from flame.runtime.agreement import RankFailure
from flame.weights.tensors import read_model_tensors
from tests.support.checkpoints import Case, age, assert_equal, build_case, edit_state, expected


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
    """Make the listed size of the index its size, so that it is read. Digests stay as they are."""
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
            index.storage_data = {place: info for place, info in index.storage_data.items() if place.fqn != key}
        replace_index(pickle.dumps(index))(folder)

    return change


def reshape(folder: Path) -> None:
    index = TensorReader(folder).read_metadata()
    table = index.state_dict_metadata["model.table"]
    table.size = table.chunks[0].sizes = torch.Size([9, 3])  # type: ignore[union-attr]
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


@pytest.mark.parametrize("is_older", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(case, tmp_path, caplog, damage, is_older):
    """By its digests; without them, by what cannot be."""
    inflict, reason = DAMAGES[damage]
    if is_older:
        age(tmp_path / "step-2")
    inflict(tmp_path / "step-2")
    assert case.load() == 1
    assert_equal(case.full(), expected(1))
    record, aside = (record for record in caplog.records if "of an older release" not in record.getMessage())
    assert aside.getMessage().endswith("step-2 is set aside as step-2.damaged") and (tmp_path / "step-2.damaged").is_dir()
    message = record.getMessage()
    assert "\n" not in message and f"checkpoint {tmp_path / 'step-2'} " in message and "passed over" in message
    assert re.search(reason if is_older else rf"{reason}|\(digest\)", message), message


def test_a_checkpoint_of_an_older_release_is_used_and_said_to_be_unverified(case, tmp_path, caplog):
    age(tmp_path / "step-2")
    assert case.load() == 2
    assert_equal(case.full(), expected(2))
    (message,) = caplog.messages
    assert message == (f"checkpoint {tmp_path / 'step-2'} is of an older release, without digests: its files cannot be verified")


def test_every_byte_counts(case, tmp_path, caplog):
    """One changed byte anywhere in a file, or a file of another step that is as long."""
    for name in (SHARD, INDEX, "hf/config.json", "hf/nested/vocab.txt"):
        kept = (tmp_path / "step-2" / name).read_bytes()
        for place in {0, len(kept) // 3, len(kept) - 1}:
            changed = bytearray(kept)
            changed[place] ^= 1
            (tmp_path / "step-2" / name).write_bytes(changed)
            with pytest.raises(ValueError, match=rf"{re.escape(name)} has other bytes than were written \(digest\)"):
                verify_files(tmp_path / "step-2", read_state(tmp_path / "step-2"))
        (tmp_path / "step-2" / name).write_bytes(kept)
    other = (tmp_path / "step-1" / SHARD).read_bytes()
    assert len(other) == (tmp_path / "step-2" / SHARD).stat().st_size
    (tmp_path / "step-2" / SHARD).write_bytes(other)
    assert case.load() == 1
    assert f"{SHARD} has other bytes than were written (digest)" in caplog.text


def test_a_digest_is_needed_where_there_are_any(case, tmp_path):
    kept = json.loads((tmp_path / "step-2" / TRAINER_FILE).read_text())
    for key in (OWN_DIGEST, DIGESTS):
        write(TRAINER_FILE, json.dumps({name: value for name, value in kept.items() if name != key}))(tmp_path / "step-2")
        with pytest.raises(ValueError, match="has been changed since it was written"):
            read_state(tmp_path / "step-2")


@pytest.mark.parametrize("older", [False, True])
def test_folders_with_swapped_names_are_neither(case, tmp_path, caplog, older):
    if older:
        age(tmp_path / "step-1")
        age(tmp_path / "step-2")
    (tmp_path / "step-1").rename(tmp_path / "other")
    (tmp_path / "step-2").rename(tmp_path / "step-1")
    (tmp_path / "other").rename(tmp_path / "step-2")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        case.load()
    assert "trainer.json is of step 1" in caplog.text and "trainer.json is of step 2" in caplog.text


def list_elsewhere(folder: Path) -> None:
    """A file outside the folder, which is there and as large as listed."""
    (folder.parent / "outside").write_bytes(b"abc")
    edit_state(folder, lambda state: state["files"].update({"../outside": 3}))


def move_shard_out(folder: Path) -> None:
    index = TensorReader(folder).read_metadata()
    for place in index.storage_data.values():
        place.relative_path = f"../step-1/{place.relative_path}"
    (folder / INDEX).write_bytes(pickle.dumps(index))
    edit_state(folder, lambda state: state["files"].update({INDEX: (folder / INDEX).stat().st_size}))


def drop_chunk(folder: Path) -> None:
    index = TensorReader(folder).read_metadata()
    index.state_dict_metadata["model.table"].chunks.clear()  # type: ignore[union-attr]
    (folder / INDEX).write_bytes(pickle.dumps(index))
    edit_state(folder, lambda state: state["files"].update({INDEX: (folder / INDEX).stat().st_size}))


def rename_member(folder: Path) -> None:
    """The changed byte that raised an AttributeError deep inside."""
    content = (folder / INDEX).read_bytes()
    assert b"sizes" in content
    (folder / INDEX).write_bytes(content.replace(b"sizes", b"sizer"))
    age(folder)


def replace_with_folder(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / INDEX).mkdir()


def link_to_nothing_that_ends(folder: Path) -> None:
    (folder / TRAINER_FILE).unlink()
    (folder / TRAINER_FILE).symlink_to("/dev/zero")


def make_file(folder: Path) -> None:
    folder.rename(folder.with_name("kept"))
    folder.write_text("not a folder")


LIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file outside": (list_elsewhere, r'lists "../outside", which is not in this folder'),
    "a shard outside": (move_shard_out, "which is no file of this folder"),
    "a tensor in part": (drop_chunk, "the chunks of model.table are not the whole of it"),
    "another member": (rename_member, ".metadata cannot be read"),
    "a folder for a file": (replace_with_folder, "is incomplete, without .metadata"),
    "an endless file": (link_to_nothing_that_ends, f"is incomplete, without {TRAINER_FILE}"),
    "a file for the folder": (make_file, "is incomplete, without .metadata"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_no_save_writes_is_damage_without_digests_too(case, tmp_path, caplog, lie):
    inflict, reason = LIES[lie]
    inflict(tmp_path / "step-2")
    assert case.load() == 1
    assert_equal(case.full(), expected(1))
    assert re.search(reason, caplog.text), caplog.text
    assert (tmp_path / "step-2.damaged").exists() and not (tmp_path / "step-2").exists()


def test_every_changed_bit_of_an_index_is_damage_or_nothing(case, tmp_path):
    """Without digests too: the one before is used, or what is loaded is what was saved."""
    age(tmp_path / "step-2")
    kept = (tmp_path / "step-2" / INDEX).read_bytes()
    chooser, found = random.Random(0), []
    for _ in range(60):
        place, bit = chooser.randrange(len(kept)), 1 << chooser.randrange(8)
        (tmp_path / "step-2" / INDEX).write_bytes(kept[:place] + bytes([kept[place] ^ bit]) + kept[place + 1 :])
        case.fill(9)
        step = case.load()
        assert step is not None
        assert_equal(case.full(), expected(step))
        found.append(step)
        if step == 1:
            (tmp_path / "step-2.damaged").rename(tmp_path / "step-2")
    assert set(found) == {1, 2}


def test_weights_that_are_not_finite_are_neither_saved_nor_used(tmp_path, caplog, monkeypatch):
    case = build_case(tmp_path)
    case.fill(1)
    case.save(1)
    case.fill(2)
    case.model.bias.data.mul_(float("nan"))
    with pytest.raises(UserError, match=r"step 2: there are weights that are not finite, first bias: nothing is saved") as told:
        case.save(2)
    assert len(told.value.lines) == 1 and "--checkpoint.load_step 1" in str(told.value)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "find_not_finite", lambda model: None)
        case.save(2)
    case.fill(9)
    assert case.load() == 1
    assert_equal(case.full(), expected(1))
    assert "step-2 cannot be read and is passed over: ValueError: its weights are not finite, first bias" in caplog.text


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
    age(tmp_path / "step-2")
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

    monkeypatch.setattr(checkpoint, "verify_files", fail)
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
