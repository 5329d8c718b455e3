"""Batches of one rank, packed ahead of time by worker processes.

Global sequence j comes from stream j % S. Of W ranks, rank r takes j = start + r + i * W, i = 0, 1, ...; of its workers,
worker w takes every i with i % workers == w. W * workers divides S, so each stream lives in one worker.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from flame.config import Training
from flame.data.batch import PackedBatch, build_batch
from flame.data.sources import Source
from flame.data.state import DataState
from flame.data.streams import Cursor, PackedSequence, Stream
from flame.data.tokenizer import encode_document
from flame.errors import UserError

# Sent to the whole process group by Ctrl-C, by schedulers and by torchrun. The training process decides what they mean.
SIGNALS_FOR_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PARENT_CHECK_SECONDS = 1.0


class PackedLoader:
    """Endless iterator over the batches of one rank. `state` follows the batches handed out; prefetched ones do not count.

    A source without any usable row raises a UserError from `__next__`, wherever the packing is done.
    """

    def __init__(
        self,
        training: Training,
        source: Source,
        tokenizer: PreTrainedTokenizerFast,
        dp_rank: int,
        dp_world: int,
        state: DataState,
    ):
        assert training.num_streams == state.num_streams and training.seed == state.seed
        assert training.num_streams % (dp_world * max(1, training.num_workers)) == 0
        self._training, self._source = training, source
        self._encode = partial(encode_document, tokenizer)
        self._dp_rank, self._dp_world = dp_rank, dp_world
        self._state = state
        self._sequences: Iterator[PackedSequence | UserError] | None = None

    def __iter__(self) -> PackedLoader:
        """Begin, or begin again, where the state stands.

        Raises:
            UserError: the source has another number of documents than when the state was saved.
        """
        self.close()
        self._state.check_documents(self._source.name, len(self._source))
        share = RankShare(
            self._training,
            self._source,
            self._encode,
            self._dp_rank,
            self._dp_world,
            self._state.next_sequence,
            self._state.cursors,
        )
        self._sequences = start_workers(share, self._training.num_workers, self._training.prefetch_factor)
        return self

    def __next__(self) -> PackedBatch:
        if self._sequences is None:
            iter(self)
        assert self._sequences is not None
        sequence = next(self._sequences)
        if isinstance(sequence, UserError):
            raise sequence
        batch = build_batch(sequence, self._state.next_sequence + self._dp_rank)
        assert batch.stream == batch.sequence_index % self._state.num_streams
        self._state.cursors[batch.stream] = batch.cursor
        self._state.next_sequence += self._dp_world
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def close(self) -> None:
        """End the worker processes. Iterating again starts new ones."""
        self._sequences = None


class RankShare(IterableDataset):
    """The sequences of one rank, dealt to its workers. Pickled into each of them."""

    def __init__(
        self,
        training: Training,
        source: Source,
        encode: Callable[[str], np.ndarray],
        dp_rank: int,
        dp_world: int,
        start: int,
        cursors: dict[int, Cursor],
    ):
        """
        Args:
            start: first global sequence to hand out, over all ranks.
            cursors: where each stream goes on; streams without one begin.
        """
        self._first, self._stride = start + dp_rank, dp_world
        self._num_streams = training.num_streams
        self._cursors = dict(cursors)
        self._open_stream = partial(
            Stream,
            source,
            encode,
            num_streams=training.num_streams,
            seq_len=training.seq_len,
            context_len=training.context_len,
            seed=training.seed,
        )

    def __iter__(self) -> Iterator[PackedSequence | UserError]:
        worker = get_worker_info()
        return self.deal(0, 1) if worker is None else self.deal(worker.id, worker.num_workers)

    def deal(self, worker: int, num_workers: int) -> Iterator[PackedSequence | UserError]:
        """Yield the sequences of one worker. A mistake of the user is yielded too, as the last item."""
        streams: dict[int, Stream] = {}
        cursors = dict(self._cursors)
        for sequence_index in itertools.count(self._first + worker * self._stride, self._stride * num_workers):
            index = sequence_index % self._num_streams
            if index not in streams:
                streams[index] = self._open_stream(index=index)
            stream = streams[index]
            try:
                sequence = stream.next_sequence(cursors.get(index, stream.first_cursor))
            except UserError as error:  # raised, it would reach the training process as a traceback in a message
                yield error
                return
            cursors[index] = sequence.cursor
            yield sequence


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
    with _signals_blocked():
        return iter(loader)


def _pass_through(sequence: Any) -> Any:
    return sequence


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started here never see SIGNALS_FOR_PARENT; this one sees them afterwards."""
    resource_tracker.ensure_running()  # started later, inside the block, it would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_FOR_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
