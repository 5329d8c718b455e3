from __future__ import annotations

import itertools
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from flame.config.schema import Training
from flame.data.batch import PackedBatch
from flame.data.document_streams import Cursor
from flame.data.encoding import encode_document
from flame.data.loader import PackedLoader, RankShare
from flame.data.mixture import Mixture
from flame.data.packing import PackedSequence
from flame.data.state import DataState, merge_states
from flame.data.tokenizer import load_tokenizer
from flame.errors import MachineFault, UserError
from tests.support.documents import ListSource, pack_plainly, tokenize_rows
from tests.support.paths import REPO
from tests.support.ranks import run_on_ranks

STREAMS, SEED = 12, 3
TOKENIZER = load_tokenizer("bytes")
TEXTS = [None if i % 7 == 3 else f"document {i} " * (1 + 5 * i % 11) for i in range(40)]
WORLDS = (1, 2, 3, 4, 6)


def make_training(num_workers: int = 0) -> Training:
    return Training(num_streams=STREAMS, num_workers=num_workers, seq_len=64, context_len=40, seed=SEED)


def make_mixture(texts: list[str | None] = TEXTS) -> Mixture:
    return Mixture((tokenize_rows(ListSource(texts), partial(encode_document, TOKENIZER)),), (1.0,))


def open_loader(
    rank: int = 0, world: int = 1, state: DataState | None = None, num_workers: int = 0, texts: list[str | None] = TEXTS
) -> PackedLoader:
    return PackedLoader(make_training(num_workers), make_mixture(texts), rank, world, state or DataState(STREAMS, SEED))


def consume(rank: int, world: int, state: DataState, count: int) -> list[PackedBatch]:
    batches = list(itertools.islice(open_loader(rank, world, state), count))
    state.advance(batches, world)
    return batches


def list_expected(count: int) -> list[tuple]:
    """Contents of the first global sequences, by the plain packer."""
    documents = [None if text is None else [*text.encode(), 256] for text in TEXTS]
    streams = [pack_plainly(documents, stream, STREAMS, 64, 40, SEED, epochs=60) for stream in range(STREAMS)]
    return [(j, *streams[j % STREAMS][j // STREAMS]) for j in range(count)]


EXPECTED = list_expected(150)


def describe(batch: PackedBatch) -> tuple:
    return batch.sequence_index, batch.input_ids[0].tolist(), batch.documents


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_share_the_same_global_sequences(world: int) -> None:
    batches = [batch for rank in range(world) for batch in itertools.islice(open_loader(rank, world), 60 // world)]
    assert sorted(map(describe, batches)) == EXPECTED[:60]


@pytest.mark.parametrize(("world", "num_workers"), [(w, n) for w in WORLDS for n in (1, 2, 3) if STREAMS % (w * n) == 0])
@pytest.mark.parametrize("start", [0, 5])
def test_workers_share_the_sequences_of_a_rank(world: int, num_workers: int, start: int) -> None:
    """Taken in turn, as a DataLoader does, the workers' sequences are those of the rank without workers."""
    cursors = {}
    for batch in itertools.islice(open_loader(), start):
        cursors[batch.stream] = batch.cursor
    for rank in range(world):
        share = RankShare(make_training(), make_mixture(), start + rank, world, {"list": cursors})
        shares = [share.deal(worker, num_workers) for worker in range(num_workers)]
        owners: dict[int, set[int]] = {}
        for i in range(24):
            sequence = next(shares[i % num_workers])
            assert isinstance(sequence, PackedSequence)
            _, tokens, chunks = EXPECTED[start + rank + i * world]
            assert (sequence.input_ids.tolist(), sequence.documents) == (tokens, chunks)
            owners.setdefault(sequence.stream, set()).add(i % num_workers)
        assert all(len(workers) == 1 for workers in owners.values())


def test_resuming_on_other_world_sizes_continues_the_same_sequences() -> None:
    saved = DataState(STREAMS, SEED).state_dict()
    found = []
    for world, steps in ((3, 5), (4, 4), (1, 7), (6, 3), (2, 11), (6, 4)):
        states = []
        for rank in range(world):
            state = DataState(STREAMS, SEED)
            state.load_state_dict(json.loads(json.dumps(saved)))
            found += map(describe, consume(rank, world, state, steps))
            states.append(state)
        saved = merge_states(states[::-1]).state_dict()
    assert sorted(found) == EXPECTED[: len(found)]
    assert saved["next_sequence"] == len(found) == 15 + 16 + 7 + 18 + 22 + 24


def test_state_is_what_was_consumed() -> None:
    state = DataState(STREAMS, SEED)
    state.check_units({"list": 40})
    batches = consume(1, 2, state, 3)
    cursors = {f"stream-{batch.stream:05d}": list(batch.cursor) for batch in batches}
    assert list(cursors) == ["stream-00001", "stream-00003", "stream-00005"]
    assert state.state_dict() == {
        "num_streams": STREAMS,
        "seed": SEED,
        "next_sequence": 6,
        "sources": {"list": {"num_units": 40, "cursors": cursors}},
    }


def test_what_is_not_consumed_comes_again() -> None:
    state = DataState(STREAMS, SEED)
    loader = open_loader(state=state)
    state.advance([next(loader), next(loader)], 1)
    assert describe(next(loader)) == EXPECTED[2] == describe(next(open_loader(state=state)))


def test_loading_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    next(open_loader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("key", "value"), [("num_streams", 24), ("seed", 4)])
def test_changed_order_is_refused(key: str, value: int) -> None:
    saved = DataState(STREAMS, SEED).state_dict() | {key: value}
    with pytest.raises(UserError, match=rf"training\.{key} = \d+, but the checkpoint was made with {value}"):
        DataState(STREAMS, SEED).load_state_dict(saved)


def test_changed_number_of_documents_is_refused() -> None:
    state = DataState(STREAMS, SEED)
    state.check_units({"list": 40, "web": 7})
    resumed = DataState(STREAMS, SEED)
    resumed.load_state_dict(state.state_dict())
    resumed.check_units({"list": 40, "new": 3})
    with pytest.raises(UserError, match=r'source "list" has 39 documents or shards, but the checkpoint was made with 40'):
        resumed.check_units({"list": 39})


def test_merging_takes_the_furthest_cursor() -> None:
    states = [
        DataState(STREAMS, SEED, 8, {"a": {0: Cursor(0, 5, 0, 1), 1: Cursor(1, 0, 0, 0)}}, {"a": 40}),
        DataState(
            STREAMS,
            SEED,
            8,
            {"a": {0: Cursor(0, 4, 0, 9), 1: Cursor(1, 0, 0, 3), 2: Cursor(0, 0, 0, 7)}, "b": {1: Cursor(0, 1, 2, 3)}},
            {"a": 40},
        ),
    ]
    cursors = {"a": {0: Cursor(0, 5, 0, 1), 1: Cursor(1, 0, 0, 3), 2: Cursor(0, 0, 0, 7)}, "b": {1: Cursor(0, 1, 2, 3)}}
    assert merge_states(states) == DataState(STREAMS, SEED, 8, cursors, {"a": 40})


def test_worker_processes_give_the_same_batches_whatever_signals_they_get() -> None:
    before = torch.get_rng_state()
    loader = open_loader(1, 2, num_workers=2)
    found = [describe(next(loader)) for _ in range(2)]  # both have begun: tests of ranks may have started the server process
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for name in ("INT", "TERM", "USR1"):  # from another process, like torchrun: from the parent, TERM means to end
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    found += [describe(next(loader)) for _ in range(18)]
    assert found == EXPECTED[1:40:2]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(worker.is_alive() for worker in workers)
    loader.close()
    assert not any(worker.is_alive() for worker in workers)


def test_ranks_of_the_tests_after_a_loader_import_nothing(tmp_path: Path) -> None:
    """A loader names what its workers need. If ranks were forked from that alone, each would take seconds to import the rest."""
    next(open_loader())
    assert run_on_ranks(1, tmp_path / "run", has_imported_the_trainer) == [True]


def has_imported_the_trainer(folder: Path) -> bool:
    return "flame.train" in sys.modules


@pytest.mark.parametrize("num_workers", [0, 1])
def test_user_error_reaches_the_training_process_as_it_is(num_workers: int) -> None:
    loader = open_loader(num_workers=num_workers, texts=[None, None])
    with pytest.raises(UserError) as caught:
        next(loader)
    assert caught.value.lines == [str(caught.value)]
    assert str(caught.value).startswith('training.dataset = "list" yields no usable text: 2 rows read')
    assert "\n" not in str(caught.value)


ENDING_PARENT = """
import multiprocessing, os, signal
from tests.data.test_loader import open_loader
loader = open_loader(num_workers=1)
next(loader)
print(multiprocessing.active_children()[0].pid, flush=True)
"""


def test_workers_end_with_the_training_process() -> None:
    """Killed, or ended by an exception with the loader still open, in which case it must not wait for its workers either."""
    endings = {"os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL, "raise SystemExit(7)": 7}
    commands = [[sys.executable, "-c", ENDING_PARENT + ending] for ending in endings]
    parents = [subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE) for command in commands]
    try:
        workers = [int(parent.communicate(timeout=60)[0]) for parent in parents]
    finally:
        for parent in parents:
            parent.kill()
    assert [parent.returncode for parent in parents] == list(endings.values())
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_killed_worker_is_one_line_that_says_so() -> None:
    loader = open_loader(num_workers=1)
    next(loader)
    assert loader.has_started
    (worker,) = loader._sequences._workers  # type: ignore[union-attr]
    worker.kill()
    with pytest.raises(MachineFault) as told:
        for _ in range(50):  # some were packed ahead
            next(loader)
    assert str(told.value) == (
        "a worker process of the loader was killed by SIGKILL, most likely since the machine was out of memory: the same command "
        "goes on from the last checkpoint; if it happens again, lower training.num_workers = 1"
    )


def test_a_loader_says_when_its_workers_have_started() -> None:
    loader = open_loader()
    assert not loader.has_started
    next(loader)
    assert loader.has_started
