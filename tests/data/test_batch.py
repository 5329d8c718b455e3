from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from flame.data.batch import PackedBatch, build_batch
from flame.data.document_streams import Cursor
from flame.data.packing import Chunk, PackedSequence
from flame.data.preview import render_sequence
from flame.data.tokenizer import load_tokenizer


def make_batch(lengths: list[int], tokens: list[int] | None = None) -> PackedBatch:
    boundaries = [0]
    for length in lengths:
        boundaries.append(boundaries[-1] + length)
    ids = np.asarray(tokens or range(1000, 1000 + boundaries[-1]), dtype=np.int64)
    chunks = [Chunk(10 + i, 5, 5 + length, 0, True) for i, length in enumerate(lengths)]
    return build_batch(PackedSequence(ids, np.asarray(boundaries, np.int32), "web", 3, Cursor(0, 1, 0, 2), chunks, 4), 27)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_labels_positions_and_segments_token_by_token(lengths: list[int]) -> None:
    batch = make_batch(lengths)
    labels, positions, segments = [], [], []
    token = 1000
    for segment, length in enumerate(lengths):
        for position in range(length):
            labels.append(token + 1 if position + 1 < length else -100)
            positions.append(position)
            segments.append(segment)
            token += 1
    assert batch.labels.tolist() == [labels]
    assert batch.position_ids.tolist() == [positions]
    assert batch.segment_ids.tolist() == [segments]
    assert batch.num_labels == sum(label != -100 for label in labels)
    assert (batch.sequence_index, batch.source, batch.stream, batch.cursor, batch.bad_rows) == (27, "web", 3, (0, 1, 0, 2), 4)
    dtypes = [t.dtype for t in (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids, batch.cu_seqlens)]
    assert dtypes == [torch.int64, torch.int64, torch.int64, torch.int32, torch.int32]


def test_moving_a_batch_moves_all_tensors_and_keeps_the_rest() -> None:
    batch = make_batch([2, 3])
    moved = batch.to("meta")
    tensors = [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
    assert tensors == ["input_ids", "labels", "position_ids", "segment_ids", "cu_seqlens", "number"]
    assert all(getattr(moved, name).device.type == "meta" for name in tensors)
    assert (moved.documents, moved.num_labels, moved.sequence_index) == (batch.documents, batch.num_labels, 27)


def test_preview_marks_documents_and_shortens_the_middle() -> None:
    first, second = "short é", "begin" + "x" * 500 + "finish"
    tokenizer = load_tokenizer("bytes")
    batch = make_batch([len(first.encode()) + 1, len(second)], [*first.encode(), 256, *second.encode()])
    head, opening, mark, rest = render_sequence(batch, tokenizer, 40).split("\n")
    assert head == "── document 10, tokens 5-13 ──"
    assert opening == "short é<|endoftext|>"
    assert mark == f"── document 11, tokens 5-{5 + len(second) - 1} ──"
    assert rest == f"beginxxxxx … {len(second) - 20} characters … xxxxfinish"


def test_preview_of_many_chunks_is_bounded() -> None:
    lines = render_sequence(make_batch([50] * 100, [97] * 5000), load_tokenizer("bytes"), 80).split("\n")
    assert lines[-1] == "── 92 more chunks ──"
    assert sum(line.count("a") for line in lines if not line.startswith("──")) < 80 + 8 * len("characters")
