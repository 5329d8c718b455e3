"""One packed sequence as the tensors of a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from flame.data.lines import Cursor
from flame.data.streams import PackedSequence, Piece

NO_LABEL = -100


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A row of T tokens in S pieces, with all that the step derives from the boundaries of the pieces.

    Example, pieces of 3 and 2 tokens: input_ids [[5, 6, 7, 8, 9]], labels [[6, 7, -100, 9, -100]],
    position_ids [[0, 1, 2, 0, 1]], segment_ids [[0, 0, 0, 1, 1]], cu_seqlens [0, 3, 5], num_labels 3.
    """

    input_ids: torch.Tensor
    """int64 [1, T]"""
    labels: torch.Tensor
    """int64 [1, T]: the next token of the same piece, -100 at the last token of each and where that is no answer."""
    position_ids: torch.Tensor
    """int64 [1, T]: from 0 in each piece."""
    segment_ids: torch.Tensor
    """int32 [1, T]: which piece a token is in, from 0."""
    cu_seqlens: torch.Tensor
    """int32 [S+1], from 0 to T."""
    sequence_index: int
    """Number of this sequence in the run, over all ranks."""
    num_labels: int
    """Labels that are not -100."""
    piece_labels: np.ndarray
    """int64 [S]: labels in each piece, the last ones."""
    source: str
    """Name of the source of all its documents."""
    stream: int
    cursor: Cursor
    """Where the next sequence of this stream of the source begins."""
    documents: Sequence[Piece]
    """The S pieces: document, token range and epoch of each."""
    bad_rows: int
    """Rows of the source passed over on the way to this sequence."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return a copy with all tensors on `device`."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return a copy with all tensors in page-locked memory, from where `to` can copy without blocking."""
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
        piece_labels = lengths - 1
        labels = np.append(input_ids[1:], NO_LABEL)
        labels[ends - 1] = NO_LABEL
    else:
        piece_labels = sequence.num_labels
        labels = np.full_like(input_ids, NO_LABEL)
        before = piece_labels.cumsum() - piece_labels  # labels in the pieces before each
        places = np.arange(piece_labels.sum()) + np.repeat(ends - 1 - piece_labels - before, piece_labels)
        labels[places] = input_ids[places + 1]
    positions = np.arange(len(input_ids), dtype=np.int64) - np.repeat(starts, lengths)
    segments = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(positions)[None],
        segment_ids=torch.from_numpy(segments)[None],
        cu_seqlens=torch.from_numpy(sequence.cu_seqlens),
        sequence_index=sequence_index,
        num_labels=int(piece_labels.sum()),
        piece_labels=piece_labels,
        source=sequence.source,
        stream=sequence.stream,
        cursor=sequence.cursor,
        documents=sequence.documents,
        bad_rows=sequence.bad_rows,
    )
