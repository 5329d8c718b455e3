"""Batches of one rank, packed ahead of time by worker processes.

The life of a batch:

1. A source is opened (`sources`, `tasks`): rows of text, shards of rows, or token ids.
2. Its documents become token ids when they are read (`documents`, `chats`, `encoding`, `tokenizer`).
3. Each source has S document streams. A stream reads its own documents in a seeded order, starting at a cursor
   (`document_streams`, `order`).
4. A packer joins the documents of one stream end to end and cuts them into packed sequences (`packing`).
5. The mixture chooses the source of each sequence of the run (`mixture`).
6. The worker processes of a rank pack its sequences ahead of time (`RankShare`, below).
7. The training process derives labels, positions, segments and where answers are (`batch`, `suffix_layout`), and returns the
   batch (`PackedLoader`, below).
8. A thread keeps batches ready, so that the training loop can stop waiting for them (`prefetch`).
9. After each step, the cursors move past what it has consumed; checkpoints store them (`state`). `audit` records what was
   consumed, `preview` shows it.

Global sequence j comes from stream j % S of the source that the mixture chooses for j. Of W ranks, rank r takes
j = start + r + i * W, i = 0, 1, ... Of its workers, worker w takes every i with i % workers == w. W * workers divides S, so each
stream is read by one worker only.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flame.config.schema import Training
from flame.data.batch import PackedBatch, build_batch
from flame.data.document_streams import Cursor
from flame.data.mixture import Mixture
from flame.data.packing import PackedSequence, Packer
from flame.data.state import DataState
from flame.errors import MachineFault, UserError
from flame.runtime.signals import block_signals, signals_blocked

PARENT_CHECK_SECONDS = 1.0
PREFETCH = 4
"""Packed sequences that each worker keeps ready."""
MOST_VAIN_SEQUENCES = 16
"""If only answers count, a worker that packs this many sequences in a row without a label reports a user error."""


class PackedLoader:
    """Endless iterator over the batches of one rank, starting at the position in `state`. It does not change `state`: call
    `state.advance` after a step.

    If packing fails with a user error, in a worker process or here, `__next__` raises it unchanged. If a worker was killed, it
    raises a MachineFault.
    """

    def __init__(self, training: Training, mixture: Mixture, dp_rank: int, dp_world: int, state: DataState):
        assert training.num_streams == state.num_streams and training.seed == state.seed
        assert training.num_streams % (dp_world * max(1, training.num_workers)) == 0
        self._training, self._mixture = training, mixture
        self._dp_world = dp_world
        self._next_index = state.next_sequence + dp_rank
        share = RankShare(training, mixture, self._next_index, dp_world, state.cursors)
        self._sequences: Iterator[PackedSequence | UserError | Started] | None = start_workers(share, training.num_workers)
        self._starting = max(training.num_workers, 1)
        """Workers that have not begun to pack."""

    @property
    def has_started(self) -> bool:
        """Whether all workers have begun to pack. Until then, a wait is not for the source."""
        return self._starting == 0

    @property
    def awaited_source(self) -> str:
        """Name, in error lines, of the source of the next batch."""
        return self._mixture.sources[self._mixture.choose(self._next_index, self._training.num_streams)].option

    def __iter__(self) -> PackedLoader:
        return self

    def __next__(self) -> PackedBatch:
        assert self._sequences is not None, "the loader is closed"
        sequence = self._take()
        while isinstance(sequence, Started):
            self._starting -= 1
            sequence = self._take()
        if isinstance(sequence, UserError):
            raise sequence
        batch = build_batch(sequence, self._next_index)
        self._next_index += self._dp_world
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def _take(self) -> PackedSequence | UserError | Started:
        assert self._sequences is not None
        try:
            return next(self._sequences)
        except RuntimeError as error:
            workers = getattr(self._sequences, "_workers", [])
            ended = [worker.exitcode for worker in workers if worker.exitcode is not None]
            if not ended or not str(error).startswith("DataLoader worker"):  # an error inside a worker comes as "Caught ..."
                raise
            raise MachineFault(explain_ended_worker(ended[0], self._training.num_workers)) from error

    def close(self) -> None:
        """End the worker processes."""
        self._sequences = None


class Started:
    """The first item of each worker."""


class RankShare(IterableDataset):
    """The sequences of one rank, divided among its workers. It is pickled into each worker."""

    def __init__(self, training: Training, mixture: Mixture, first: int, stride: int, cursors: dict[str, dict[int, Cursor]]):
        """
        Args:
            first: global index of the rank's first sequence.
            stride: number of ranks, the distance between the rank's sequences.
            cursors: position of each stream by source; a stream without a cursor starts at its beginning.
        """
        self._training, self._mixture = training, mixture
        self._first, self._stride = first, stride
        self._cursors = {name: dict(streams) for name, streams in cursors.items()}

    def __iter__(self) -> Iterator[PackedSequence | UserError | Started]:
        worker = get_worker_info()
        yield Started()
        yield from self.deal(0, 1) if worker is None else self.deal(worker.id, worker.num_workers)

    def deal(self, worker: int, num_workers: int) -> Iterator[PackedSequence | UserError]:
        """Yield the sequences of one worker. A user error is yielded too, as the last item."""
        num_streams = self._training.num_streams
        streams: dict[tuple[int, int], Packer] = {}
        cursors = {name: dict(known) for name, known in self._cursors.items()}
        vain_sequences = 0
        for sequence_index in itertools.count(self._first + worker * self._stride, self._stride * num_workers):
            key = self._mixture.choose(sequence_index, num_streams), sequence_index % num_streams
            try:
                if key not in streams:
                    streams[key] = self._mixture.open_packer(*key, num_streams, self._training)
                stream = streams[key]
                known = cursors.setdefault(self._mixture.sources[key[0]].name, {})
                sequence = stream.next_sequence(known.get(key[1], stream.first_cursor))
                vain_sequences = 0 if sequence.has_labels() else vain_sequences + 1
                if vain_sequences == MOST_VAIN_SEQUENCES:
                    raise UserError(explain_no_answers(self._mixture.sources[key[0]].option, self._training))
            except UserError as error:  # if raised in a worker, it would arrive as a traceback inside another message
                yield error
                return
            known[key[1]] = sequence.cursor
            yield sequence


def explain_ended_worker(exit_code: int, num_workers: int) -> str:
    """The error line for a worker process that has ended.

    Args:
        exit_code: negative for a signal.
    """
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"has ended with exit code {exit_code}"
    likely = ", most likely since the machine was out of memory" if exit_code == -signal.SIGKILL else ""
    return (
        f"a worker process of the loader {how}{likely}: the same command goes on from the last checkpoint; if it happens again, "
        f"lower training.num_workers = {num_workers}"
    )


def explain_no_answers(option: str, training: Training) -> str:
    """The error line for a source whose packed sequences hold no answer."""
    if training.loss_on != "answer":
        return (
            f'{option} has nothing of an assistant that training.loss_on = "{training.loss_on}" could count: check its chats, '
            f"and that training.context_len = {training.context_len} is more than the length of their prompts"
        )
    return (
        f'{option} has no answers that training.loss_on = "answer" could count: check that training.answer_separator = '
        f"{json.dumps(training.answer_separator)} ends its prompts, and that training.context_len = {training.context_len} is "
        "more than their length"
    )


def start_workers(share: RankShare, num_workers: int) -> Iterator[PackedSequence | UserError | Started]:
    """Iterate over a rank's sequences. `num_workers` processes pack them ahead of time; with 0 they are packed in this process.

    Workers send token ids and boundaries as numpy arrays, by value. Tensors would be sent through shared memory, of which
    containers have only 64 MiB by default.

    A server process imports everything once and forks the workers. It has neither CUDA nor threads, which a fork would break.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, *_list_imports_of_main()])
    loader: DataLoader = DataLoader(
        share,
        batch_size=None,
        collate_fn=_pass_through,
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        multiprocessing_context=server if num_workers else None,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # using the global generator would change the run's dropout
    )
    with signals_blocked():
        return iter(loader)


def _list_imports_of_main() -> list[str]:
    """What the module that `python -m` runs has imported. Python runs it again in each worker, unless it is a `__main__.py`."""
    main = sys.modules["__main__"]
    if getattr(main.__spec__, "name", "__main__").endswith("__main__"):
        return []
    owners = {getattr(value, "__module__", None) for value in vars(main).values()}
    return sorted(owner for owner in owners if owner in sys.modules and owner != "__main__")


def _pass_through(sequence: Any) -> Any:
    return sequence


def _end_with_parent(_worker: int) -> None:
    """End this worker when the training process is gone, even if it was killed, or when it sends SIGTERM at its exit."""
    block_signals()  # they are, unless somebody else has started the server process
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        while parent.is_alive():
            received = signal.sigtimedwait([signal.SIGTERM], PARENT_CHECK_SECONDS)
            if received is not None and received.si_pid == parent.pid:
                break
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
