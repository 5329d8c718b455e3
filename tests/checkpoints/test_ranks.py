"""Saving and resuming over several processes: other numbers of ranks, HSDP, uneven shards, and failures of one rank."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.device_mesh import init_device_mesh

from flame.checkpoints import random_state
from flame.checkpoints.manager import TRAINER_FILE, list_checkpoints
from flame.checkpoints.storage import TensorReader, TensorWriter
from flame.errors import UserError
from flame.runtime.agreement import RankFailure, run_on_all, run_on_main
from tests.support.checkpoints import Case, assert_equal, build_case, expected, read_stored
from tests.support.ranks import PROCESSES, run_on_ranks


def go_on(folder: Path, shape: tuple[int, ...], asynchronous: bool, before: int) -> list[str]:
    """Resume from step `before`, change everything, save the step after it. Returns the names of all checkpoints.

    Random states are taken over only on as many ranks as they were saved from.
    """
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "fsdp")[-len(shape) :])
    case = build_case(folder, mesh, keep=0, asynchronous=asynchronous)
    case.fill(99)
    torch.manual_seed(77)
    own = torch.get_rng_state()
    assert case.load() == (before or None)
    if before:
        saved_ranks = json.loads((folder / f"step-{before}" / TRAINER_FILE).read_text())["world_size"]
        saved = torch.Generator().manual_seed(1000 * before + dist.get_rank()).get_state()
        assert torch.equal(torch.get_rng_state(), saved if saved_ranks == dist.get_world_size() else own)
        assert_equal(case.full(), expected(before))
    case.fill(before + 1)
    torch.manual_seed(1000 * (before + 1) + dist.get_rank())
    case.save(before + 1)
    case.fill(98)
    case.checkpointer.close()
    return [path.name for path in list_checkpoints(folder)]


def test_any_number_of_ranks_goes_on_from_any_other(tmp_path):
    """FSDP on 1, 2, 4 ranks, HSDP 2 x 2, FSDP on 2, one process: each time all tensors are the same, also in the files."""
    folder = tmp_path / "run"
    stages = [((1,), False), ((2,), True), ((4,), False), ((2, 2), True), ((2,), True), ((1,), True)]
    for before, (shape, asynchronous) in enumerate(stages):
        ranks = torch.Size(shape).numel()
        visible = run_on_ranks(ranks, folder, go_on, shape, asynchronous, before)
        assert visible == [[f"step-{step}" for step in range(1, before + 2)]] * ranks
    for step, (shape, _) in enumerate(stages, start=1):
        stored = read_step(folder, step)
        states = {name: stored.pop(name) for name in list(stored) if name.startswith("rng.")}
        assert stored == {name: value.tolist() for name, value in expected(step).items()}
        for rank in range(torch.Size(shape).numel()):
            generator = torch.Generator().manual_seed(1000 * step + rank)
            assert states[f"rng.rank-{rank:05d}.torch"] == generator.get_state().tolist()
        assert len(states) == len(random_state.capture()) * torch.Size(shape).numel()


def read_step(folder: Path, step: int) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in read_stored(folder / f"step-{step}").items()}


def meet_failures(folder: Path) -> dict[str, Any]:
    """On four ranks: failures that one of them meets."""
    rank = dist.get_rank()
    case = build_case(folder, keep=1, asynchronous=True)
    case.fill(1)
    case.save(1)
    case.checkpointer.wait()
    seen: dict[str, Any] = {"full": fail_on(3, case, OSError(errno.ENOSPC, "No space left")), "partial": count_partial(folder)}
    seen["broken"] = fail_on(1, case, OSError(errno.EIO, "broken"))
    case.save(2)  # the failures are over and told
    case.checkpointer.wait()
    seen["afterwards"] = [path.name for path in list_checkpoints(folder)]

    case.fill(3)
    torch.manual_seed(rank)
    case.save(3)
    wanted = torch.rand(()).item()
    assert case.load() == 3
    seen["draws on"] = torch.rand(()).item() == wanted
    return seen


def fail_on(rank: int, case: Case, error: OSError) -> str:
    """What `wait` raises when one rank cannot write."""
    write = TensorWriter.write_data
    if dist.get_rank() == rank:

        def fail(*arguments):
            raise error

        TensorWriter.write_data = fail  # type: ignore[method-assign]
    try:
        case.save(9)
        case.checkpointer.wait()
    except (UserError, RankFailure) as caught:
        return f"{type(caught).__name__}: {caught}"
    finally:
        TensorWriter.write_data = write  # type: ignore[method-assign]
    return "nothing"


def count_partial(folder: Path) -> int:
    dist.barrier()
    return len(list(folder.glob("*.partial")))


def test_a_failure_of_one_rank_is_raised_on_all(tmp_path):
    for seen in run_on_ranks(4, tmp_path / "run", meet_failures):
        assert seen["full"].startswith("UserError: job.dump_folder: the disk of") and "\n" not in seen["full"]
        assert "was not saved: OSError: [Errno 5] broken" in seen["broken"] and seen["broken"].startswith("RankFailure")
        assert (seen["partial"], seen["afterwards"], seen["draws on"]) == (0, ["step-2"], True)


def pass_over(folder: Path) -> list[Any]:
    """On two ranks, of which only the second cannot read one checkpoint's index, and refuses another."""
    case = build_case(folder, keep=0)
    for step in (1, 2, 3):
        case.fill(step)
        case.save(step)
    if dist.get_rank() == 0:
        os.truncate(folder / "step-3" / "__1_0.distcp", 10)
    read = TensorReader.read_metadata

    def fail(self, *arguments, **options):
        if str(self.path).endswith("step-2"):
            raise OSError("unreachable")
        return read(self, *arguments, **options)

    if dist.get_rank() == 1:
        TensorReader.read_metadata = fail  # type: ignore[method-assign]
    case.fill(9)
    loaded = case.load()
    assert_equal(case.full(), expected(1))
    TensorReader.read_metadata = read  # type: ignore[method-assign]

    def refuse(state: dict[str, Any]) -> None:
        if dist.get_rank() == 1:
            raise UserError("rank 1 has another tokenizer")

    try:
        case.checkpointer.load_latest(refuse)
    except UserError as error:
        return [loaded, str(error)]
    return [loaded, "nothing"]


def test_all_ranks_use_the_same_checkpoint(tmp_path):
    assert run_on_ranks(2, tmp_path / "run", pass_over) == [[1, "rank 1 has another tokenizer"]] * 2


def agree(folder: Path) -> list[str]:
    rank = dist.get_rank()

    def act(failing: dict[int, Exception]) -> int:
        if rank in failing:
            raise failing[rank]
        return rank * 10

    seen = [str(run_on_all(lambda: act({}))), str(run_on_main(lambda: act({})))]
    for failing in ({1: KeyError("x")}, {0: OSError("first"), 1: UserError("one", "two")}):
        try:
            run_on_all(lambda failing=failing: act(failing))  # type: ignore[misc]
        except (RankFailure, UserError) as error:
            seen.append(f"{type(error).__name__} {error}")
    try:
        run_on_main(lambda: act({0: ValueError("a\nb"), 1: ValueError("not called")}))
    except RankFailure as failure:
        seen.append(str(failure))
    return seen


def test_ranks_agree(tmp_path):
    shared = ["RankFailure KeyError: 'x'", "UserError one\ntwo", "ValueError: a b"]
    assert run_on_ranks(2, tmp_path / "run", agree) == [["0", "0", *shared], ["10", "0", *shared]]


class InterruptedWriter(FileSystemWriter):
    """Ctrl-C arrives on the last rank, inside torch's checkpointing."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise KeyboardInterrupt
        return plan


def interrupt(folder: Path) -> str:
    try:
        run_on_all(lambda: dcp.save({"x": torch.ones(2)}, storage_writer=InterruptedWriter(folder)))
    except BaseException as error:
        return type(error).__name__
    return "saved"


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupt_while_writing_is_one(tmp_path, ranks):
    assert run_on_ranks(ranks, tmp_path / "run", interrupt) == ["KeyboardInterrupt"] * ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_process_that_dies_while_writing_leaves_the_last_commit(tmp_path, ranks):
    folder = tmp_path / "run"
    run_on_ranks(ranks, folder, go_on, (ranks,), True, 0)
    rendezvous = tmp_path / "death"
    processes = [PROCESSES.Process(target=_die, args=(rank, ranks, rendezvous, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 7
    assert [path.name for path in list_checkpoints(folder)] == ["step-1"] and (folder / "step-2.partial").exists()
    visible = run_on_ranks(ranks, folder, go_on, (ranks,), True, 1)
    assert visible == [["step-1", "step-2"]] * ranks and not list(folder.glob("*.partial"))


def _die(rank: int, ranks: int, rendezvous: Path, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    write = TensorWriter.write_data

    def write_and_die(*arguments):
        write(*arguments)
        os._exit(7)

    TensorWriter.write_data = write_and_die  # type: ignore[method-assign]
    case = build_case(folder, asynchronous=True)
    case.save(2)
    case.checkpointer.wait()
