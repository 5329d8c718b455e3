"""Text to tokens, by processes that work ahead: what fills a folder of tokens."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection

import numpy as np
from transformers import PreTrainedTokenizerFast

from flame.components.preemption import signals_blocked
from flame.data.sources import Source
from flame.data.token_folder import TOKEN_DTYPES, TokenDtype
from flame.data.tokenizer import encode_documents
from flame.errors import UserError

LONGEST_SPAN = 256  # rows
CHARACTERS_AT_ONCE = 1 << 18  # through the tokenizer, which needs about 100 bytes for each
SPANS_AHEAD = 3  # of each worker


@dataclass(frozen=True)
class Span:
    """The rows [start, stop)."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class EncodedSpan:
    """The documents of a span, end to end."""

    tokens: np.ndarray
    """uint16 or uint32 [n]"""
    lengths: np.ndarray
    """int64 [documents]"""
    bad_rows: int


def plan_spans(done: int, rows: int, num_workers: int) -> Iterator[Span]:
    """Cut the rows from `done` on into spans, short enough that all workers have several."""
    length = min(LONGEST_SPAN, -(-rows // (8 * max(1, num_workers))))
    return (Span(start, min(start + length, rows)) for start in range(done, rows, length))


class SpanEncoder:
    """Reads and tokenizes spans of a source. Pickled into each worker."""

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerFast, dtype: TokenDtype, vocabulary_size: int):
        self._source, self._tokenizer = source, tokenizer
        self._dtype, self._vocabulary_size = TOKEN_DTYPES[dtype], vocabulary_size

    def encode(self, span: Span) -> EncodedSpan:
        documents: list[np.ndarray] = []
        bad_rows = 0
        texts: list[str] = []
        characters = 0
        for text in map(self._source.read, range(span.start, span.stop)):
            if text is None:
                bad_rows += 1
                continue
            texts.append(text)
            characters += len(text)
            if characters >= CHARACTERS_AT_ONCE:
                documents += self._encode_batch(texts)
                texts, characters = [], 0
        documents += self._encode_batch(texts)
        tokens = np.concatenate([np.empty(0, self._dtype), *documents])
        return EncodedSpan(tokens, np.array([len(ids) for ids in documents], dtype=np.int64), bad_rows)

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        documents = encode_documents(self._tokenizer, texts)
        assert all(ids.max() < self._vocabulary_size for ids in documents)
        return [ids.astype(self._dtype) for ids in documents]


def encode_in_order(
    encoder: SpanEncoder, spans: Iterable[Span], num_workers: int
) -> Generator[tuple[Span, EncodedSpan], None, None]:
    """Yield each span with its documents, encoded ahead by `num_workers` processes, or here when 0.

    Raises:
        UserError: a worker process died. The pool may also wait for it forever (CPython gh-94777); killed, a restart goes on.
    """
    if not num_workers:
        for span in spans:
            yield span, encoder.encode(span)
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(encoder,))
    pending: deque[tuple[Span, Future[EncodedSpan]]] = deque()
    try:
        for span in spans:
            with signals_blocked():  # which starts workers as needed
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
            worker.kill()  # its work is not wanted any more
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: SpanEncoder


def _start_worker(encoder: SpanEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def end_with_parent() -> None:  # killed, it cannot say so, and the pool's queue would wait for it forever
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()


def _encode_in_worker(span: Span) -> EncodedSpan:
    return _worker_encoder.encode(span)
