"""One packed sequence as the tensors of a training step: step 7 in the life of a batch (`flame.data.loader`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from flame.data.document_streams import Cursor
from flame.data.packing import Chunk, PackedSequence

NO_LABEL = -100


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A packed sequence of T tokens in S chunks, with everything derived from the boundaries of the chunks.

    Example with chunks of 3 and 2 tokens: input_ids [[5, 6, 7, 8, 9]], labels [[6, 7, -100, 9, -100]],
    position_ids [[0, 1, 2, 0, 1]], segment_ids [[0, 0, 0, 1, 1]], cu_seqlens [0, 3, 5], num_labels 3.
    """

    input_ids: torch.Tensor
    """int64 [1, T]"""
    labels: torch.Tensor
    """int64 [1, T]: the next token of the same chunk. -100 at the last token of a chunk, and where the next token does not count.
    """
    position_ids: torch.Tensor
    """int64 [1, T]: from 0 in each chunk."""
    segment_ids: torch.Tensor
    """int32 [1, T]: number of the token's chunk, from 0."""
    cu_seqlens: torch.Tensor
    """int32 [S+1], from 0 to T."""
    sequence_index: int
    """Number of this sequence in the run, over all ranks."""
    num_labels: int
    """Labels that are not -100."""
    chunk_labels: np.ndarray
    """int64 [S]: number of labels in each chunk. They are the last tokens of the chunk."""
    source: str
    """Name of the source of all its documents."""
    stream: int
    cursor: Cursor
    """Start of the next sequence of this stream."""
    documents: Sequence[Chunk]
    """The S chunks: document, token range and epoch of each."""
    bad_rows: int
    """Rows without usable text that were skipped while packing this sequence."""
    answers_only: bool = False
    """Whether only the tokens of answers are labels. Otherwise every token of a chunk except the first is a label."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return a copy with all tensors on `device`."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return a copy with all tensors in page-locked memory, from which `to` can copy without blocking."""
        return self._map_tensors(torch.Tensor.pin_memory)

    def _map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **changed)


def build_batch(sequence: PackedSequence, sequence_index: int) -> PackedBatch:
    """Derive labels, positions and segments of a packed sequence."""
    starts, ends = sequence.cu_seqlens[:-1], sequence.cu_seqlens[1:]
    lengths = ends.astype(np.int64) - starts
    input_ids = sequence.input_ids
    if sequence.num_labels is None:
        chunk_labels = lengths - 1
        labels = np.append(input_ids[1:], NO_LABEL)
        labels[ends - 1] = NO_LABEL
    else:
        chunk_labels = sequence.num_labels
        labels = np.full_like(input_ids, NO_LABEL)
        before = chunk_labels.cumsum() - chunk_labels  # labels in the chunks before each
        labelled = np.arange(chunk_labels.sum()) + np.repeat(ends - 1 - chunk_labels - before, chunk_labels)
        labels[labelled] = input_ids[labelled + 1]
    positions = np.arange(len(input_ids), dtype=np.int64) - np.repeat(starts, lengths)
    segments = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(positions)[None],
        segment_ids=torch.from_numpy(segments)[None],
        cu_seqlens=torch.from_numpy(sequence.cu_seqlens),
        sequence_index=sequence_index,
        num_labels=int(chunk_labels.sum()),
        chunk_labels=chunk_labels,
        source=sequence.source,
        stream=sequence.stream,
        cursor=sequence.cursor,
        documents=sequence.documents,
        bad_rows=sequence.bad_rows,
        answers_only=sequence.num_labels is not None,
    )
