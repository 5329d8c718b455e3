"""How even passes are: the estimate against what streams read."""

from __future__ import annotations

import numpy as np
import pytest

from flame.data.document_streams import open_document_stream
from flame.data.documents import WHOLE
from flame.data.packing import Packer
from flame.data.passes import MOST_DRAWN, estimate_repeats
from tests.support.documents import ListSource, tokenize_rows

NUM_DOCUMENTS, SEQ_LEN = 400, 7


def draw_lengths(spread: float) -> np.ndarray:
    return np.maximum(np.random.default_rng(1).lognormal(5.0, spread, NUM_DOCUMENTS), 1).astype(np.int64)


def repeat(lengths: np.ndarray, num_streams: int, epochs: int, seed: int) -> float:
    """What streams that take turns repeat."""
    documents = tokenize_rows(ListSource([f"{length}" for length in lengths]), lambda text: np.zeros(int(text), np.int32))
    read = np.zeros(NUM_DOCUMENTS)
    for stream in range(num_streams):
        packer = Packer(open_document_stream(documents, WHOLE, stream, num_streams, seed), "x", stream, SEQ_LEN, SEQ_LEN, None)
        cursor = packer.first_cursor
        for _ in range(int(lengths.sum()) * epochs // (num_streams * SEQ_LEN)):
            packed = packer.next_sequence(cursor)
            cursor = packed.cursor
            for chunk in packed.documents:
                read[chunk.document] += chunk.end - chunk.start
    return np.maximum(read - epochs * lengths, 0).sum() / read.sum()


@pytest.mark.parametrize(
    ("num_streams", "epochs", "spread"), [(1, 1, 1.0), (8, 1, 1.0), (48, 1, 1.0), (48, 3, 1.0), (48, 1, 0.0), (300, 1, 1.0)]
)
def test_the_estimate_is_near_what_streams_repeat(num_streams: int, epochs: int, spread: float) -> None:
    lengths = draw_lengths(spread)
    found = float(np.mean([repeat(lengths, num_streams, epochs, seed) for seed in range(6 // epochs)]))
    assert estimate_repeats(lengths, num_streams, epochs) == pytest.approx(found, abs=0.01, rel=0.2)
    assert found > 0.1 or not (num_streams >= 48 and epochs == 1 and spread)


def test_of_too_many_documents_and_of_fewer_than_streams_there_is_no_estimate() -> None:
    """The first are even; of the second another line says that streams share them."""
    assert estimate_repeats(np.ones(10), 7, MOST_DRAWN) == 0.0
    assert [estimate_repeats(np.arange(1, count + 1), 192, epochs) for count in (0, 1, 63, 191) for epochs in (0.01, 1, 9)] == [
        0
    ] * 12
