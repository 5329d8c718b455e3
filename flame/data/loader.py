"""Batches of one rank, packed ahead of time by worker processes.

Global sequence j comes from stream j % S of the source that the mixture chooses for j. Of W ranks, rank r takes
j = start + r + i * W, i = 0, 1, ...; of its workers, worker w takes every i with i % workers == w. W * workers divides S, so each
stream lives in one worker.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flame.components.preemption import signals_blocked
from flame.config import Training
from flame.data.batch import PackedBatch, build_batch
from flame.data.lines import Cursor
from flame.data.mixture import Mixture
from flame.data.state import DataState
from flame.data.streams import PackedSequence, Stream
from flame.errors import UserError

PARENT_CHECK_SECONDS = 1.0
MOST_VAIN_SEQUENCES = 16
"""That one worker may pack in a row without a label, where only answers count. More are a mistake of the user."""


class PackedLoader:
    """Endless iterator over the batches of one rank from where `state` stands. `state.advance` notes what has been consumed.

    A mistake of the user met while packing, such as a source without any usable row, is raised from `__next__` as it is,
    wherever the packing is done.
    """

    def __init__(self, training: Training, mixture: Mixture, dp_rank: int, dp_world: int, state: DataState):
        assert training.num_streams == state.num_streams and training.seed == state.seed
        assert training.num_streams % (dp_world * max(1, training.num_workers)) == 0
        self._training, self._mixture = training, mixture
        self._dp_world = dp_world
        self._next_index = state.next_sequence + dp_rank
        share = RankShare(training, mixture, self._next_index, dp_world, state.cursors)
        self._sequences: Iterator[PackedSequence | UserError] | None = start_workers(
            share, training.num_workers, training.prefetch_factor
        )

    @property
    def awaited_source(self) -> str:
        """How error lines name the source of the batch that comes next."""
        return self._mixture.sources[self._mixture.choose(self._next_index, self._training.num_streams)].option

    def __iter__(self) -> PackedLoader:
        return self

    def __next__(self) -> PackedBatch:
        assert self._sequences is not None, "the loader is closed"
        sequence = next(self._sequences)
        if isinstance(sequence, UserError):
            raise sequence
        batch = build_batch(sequence, self._next_index)
        self._next_index += self._dp_world
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def close(self) -> None:
        """End the worker processes."""
        self._sequences = None


class RankShare(IterableDataset):
    """The sequences of one rank, dealt to its workers. Pickled into each of them."""

    def __init__(self, training: Training, mixture: Mixture, first: int, stride: int, cursors: dict[str, dict[int, Cursor]]):
        """
        Args:
            first: global index of the rank's first sequence; the others follow at `stride`, the number of ranks.
            cursors: where each stream of each source goes on; those without one begin.
        """
        self._training, self._mixture = training, mixture
        self._first, self._stride = first, stride
        self._cursors = {name: dict(streams) for name, streams in cursors.items()}

    def __iter__(self) -> Iterator[PackedSequence | UserError]:
        worker = get_worker_info()
        return self.deal(0, 1) if worker is None else self.deal(worker.id, worker.num_workers)

    def deal(self, worker: int, num_workers: int) -> Iterator[PackedSequence | UserError]:
        """Yield the sequences of one worker. A mistake of the user is yielded too, as the last item."""
        num_streams = self._training.num_streams
        streams: dict[tuple[int, int], Stream] = {}
        cursors = {name: dict(known) for name, known in self._cursors.items()}
        vain_sequences = 0
        for sequence_index in itertools.count(self._first + worker * self._stride, self._stride * num_workers):
            key = self._mixture.choose(sequence_index, num_streams), sequence_index % num_streams
            try:
                if key not in streams:
                    streams[key] = self._mixture.open_stream(*key, num_streams, self._training)
                stream = streams[key]
                known = cursors.setdefault(self._mixture.sources[key[0]].name, {})
                sequence = stream.next_sequence(known.get(key[1], stream.first_cursor))
                vain_sequences = 0 if sequence.has_labels() else vain_sequences + 1
                if vain_sequences == MOST_VAIN_SEQUENCES:
                    raise UserError(explain_no_answers(self._mixture.sources[key[0]].option, self._training))
            except UserError as error:  # raised, it would reach the training process as a traceback in a message
                yield error
                return
            known[key[1]] = sequence.cursor
            yield sequence


def explain_no_answers(option: str, training: Training) -> str:
    """What to say where packs of a source hold no answer."""
    return (
        f'{option} has no answers that training.loss_on = "answer" could count: check that training.answer_separator = '
        f"{json.dumps(training.answer_separator)} ends its prompts, and that training.context_len = {training.context_len} is "
        "more than their length"
    )


def start_workers(share: RankShare, num_workers: int, prefetch_factor: int) -> Iterator[PackedSequence | UserError]:
    """Iterate over a rank's share, packed ahead by `num_workers` processes, or packed here when 0.

    Workers send token ids and boundaries by value, as numpy arrays: tensors would travel through shared memory, of which
    containers have 64 MiB by default.
    """
    loader: DataLoader = DataLoader(
        share,
        batch_size=None,
        collate_fn=_pass_through,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        multiprocessing_context="spawn" if num_workers else None,  # a forked worker inherits CUDA and locks in a broken state
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # the global one would be advanced, and with it the run's dropout
    )
    with signals_blocked():
        return iter(loader)


def _pass_through(sequence: Any) -> Any:
    return sequence


def _end_with_parent(_worker: int) -> None:
    """End this worker when the training process is gone, even killed, or says so: when it exits it terminates its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        while parent.is_alive():
            received = signal.sigtimedwait([signal.SIGTERM], PARENT_CHECK_SECONDS)
            if received is not None and received.si_pid == parent.pid:
                break
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
