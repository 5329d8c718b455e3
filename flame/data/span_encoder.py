"""Tokenizes text with worker processes, for flame-preprocess."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.data.encoding import Labelled, Rendered, Row, encode_chat, encode_documents
from flame.data.sources.base import TextRows
from flame.data.sources.token_folder import TOKEN_DTYPES, TokenDtype
from flame.errors import UserError
from flame.runtime.signals import signals_blocked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LONGEST_SPAN = 4096  # rows
CHARACTERS_IN_SPAN = 1 << 17  # on average: long rows come in clusters, of which no worker should get a whole one
SPANS_OF_WORKER = 32  # at least, so that workers finish together
SAMPLED_ROWS = 32
CHARACTERS_AT_ONCE = 1 << 18  # per call of the tokenizer, which needs about 100 bytes of memory for each
SPANS_AHEAD = 32  # queued for each worker, so that all go on while one encodes a long row


@dataclass(frozen=True)
class Span:
    """The rows [start, stop)."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class EncodedSpan:
    """The tokens of a span's documents, end to end."""

    tokens: np.ndarray
    """uint16 or uint32 [n]"""
    lengths: np.ndarray
    """int64 [documents]"""
    bad_rows: int
    labels: np.ndarray
    """uint8 [n] if the rows say what the assistant wrote, else [0]: 1 for its tokens."""


def plan_spans(done: int, rows: int, num_workers: int, mean_length: float) -> Iterator[Span]:
    """Cut the rows from `done` on into spans, so short that every worker gets many.

    Args:
        mean_length: characters of a row.
    """
    longest = min(LONGEST_SPAN, -(-rows // (SPANS_OF_WORKER * max(1, num_workers))))
    length = max(1, min(longest, int(CHARACTERS_IN_SPAN / max(1.0, mean_length))))
    return (Span(start, min(start + length, rows)) for start in range(done, rows, length))


class SpanEncoder:
    """Reads and tokenizes spans of a source."""

    def __init__(
        self, rows: TextRows, tokenizer: PreTrainedTokenizerFast, dtype: TokenDtype, vocabulary_size: int, has_labels: bool
    ):
        self._rows: Any = rows
        self._tokenizer, self._has_labels = tokenizer, has_labels
        self._dtype, self._vocabulary_size = TOKEN_DTYPES[dtype], vocabulary_size

    def check_rows(self) -> None:
        """Check that worker processes can have rows of their own.

        Raises:
            UserError: the rows cannot be pickled. An open file is an example.
        """
        try:
            pickle.dumps(self._rows)
        except Exception as error:  # a user's class may raise anything
            raise UserError(
                f"the source cannot be sent to worker processes ({error}): open files inside read(), or give --num_workers 0"
            ) from error

    def reopen_rows(self) -> None:
        """Replace the rows by a copy. A forked process shares the position in each open file with its parent."""
        self._rows = pickle.loads(pickle.dumps(self._rows))

    def measure_rows(self) -> float:
        """Mean characters of a row, estimated by a few."""
        count = len(self._rows)
        sample = [self._rows.read(index) for index in range(0, count, -(-count // SAMPLED_ROWS))]
        return sum(len(text) for text in sample if text is not None) / len(sample)

    def encode(self, span: Span) -> EncodedSpan:
        documents: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        bad_rows = 0
        texts: list[Row] = []
        characters = 0
        for text in map(self._rows.read, range(span.start, span.stop)):
            if text is None:
                bad_rows += 1
                continue
            texts.append(text)
            characters += len(text)
            if characters >= CHARACTERS_AT_ONCE:
                self._encode_batch(texts, documents, labels)
                texts, characters = [], 0
        self._encode_batch(texts, documents, labels)
        tokens = np.concatenate([np.empty(0, self._dtype), *documents])
        lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
        return EncodedSpan(tokens, lengths, bad_rows, np.concatenate([np.empty(0, np.uint8), *labels]))

    def _encode_batch(self, texts: list[Row], documents: list[np.ndarray], labels: list[np.ndarray]) -> None:
        """Append the ids of each text to `documents`, and its labels to `labels` if there are any."""
        if self._has_labels:
            chats = [encode_chat(self._tokenizer, text) for text in texts if isinstance(text, Rendered)]
            encoded = [chat.tokens for chat in chats]
            labels += map(_mark, chats)
        else:
            encoded = encode_documents(self._tokenizer, texts)
        assert len(encoded) == len(texts) and all(ids.max() < self._vocabulary_size for ids in encoded)
        documents += [ids.astype(self._dtype) for ids in encoded]


def _mark(chat: Labelled) -> np.ndarray:
    """uint8 [n]: 1 for the tokens that count."""
    marks = np.zeros(len(chat.tokens), dtype=np.uint8)
    for start, end in chat.spans:
        marks[start:end] = 1
    return marks


def encode_in_order(
    encoder: SpanEncoder, spans: Iterable[Span], num_workers: int
) -> Generator[tuple[Span, EncodedSpan], None, None]:
    """Yield each span with its documents, in order. `num_workers` processes encode them ahead; with 0, this process does.

    The workers are forked. A spawned one would import everything again, which takes seconds, and it would read the tokenizer from
    a pipe that is too small for it: the next worker would start only when the one before has finished its imports.

    Raises:
        UserError: the rows cannot be sent to a worker process, or one died. The process pool may instead wait forever (CPython
            gh-94777); then kill and restart.
    """
    if not num_workers:
        for span in spans:
            yield span, encoder.encode(span)
        return
    encoder.check_rows()
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(encoder,))
    pending: deque[tuple[Span, Future[EncodedSpan]]] = deque()
    try:
        for span in spans:
            with signals_blocked():  # the first `submit` starts the workers, which inherit the blocked signals
                pending.append((span, pool.submit(_encode_in_worker, span)))
            if len(pending) == SPANS_AHEAD * num_workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, for want of memory perhaps: the same command goes on where this one stopped; "
            f"--num_workers = {num_workers} may be lowered"
        ) from error
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()  # its work is no longer needed
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: SpanEncoder


def _start_worker(encoder: SpanEncoder) -> None:
    global _worker_encoder
    encoder.reopen_rows()
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def end_with_parent() -> None:  # if the parent was killed, the pool's queue would wait for it forever
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()


def _encode_in_worker(span: Span) -> EncodedSpan:
    return _worker_encoder.encode(span)
