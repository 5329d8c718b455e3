"""One packed sequence as the tensors of a training step: step 7 in the life of a batch (`flame.data.loader`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from flame.data.buckets import round_up_to_bucket
from flame.data.document_streams import Cursor
from flame.data.packing import Chunk, PackedSequence
from flame.data.suffix_layout import lay_out_suffixes, list_positions

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
    number: torch.Tensor
    """int64 0-d: `sequence_index`, for draws on the device."""
    sequence_index: int
    """Number of this sequence in the run, over all ranks."""
    num_labels: int
    """Labels that are not -100."""
    chunk_labels: np.ndarray
    """int64 [S]: number of labels in each chunk."""
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
    """Whether only some tokens are labels. Otherwise every token of a chunk except the first is one."""
    answers: np.ndarray = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    """int64 [A, 2], if only some tokens are labels: in each chunk with labels, the positions from the one that predicts the first
    label to the end of the chunk."""
    tokens_left: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """int64 [num_labels], if only some tokens are labels: for each, how many tokens of its chunk follow the position that
    predicts it, at least 1."""
    num_predicted: int = 0
    """If only some tokens are labels: `num_labels`, padded to a bucket size."""
    suffix_positions: torch.Tensor | None = None
    """If only some tokens are labels: `SuffixLayout.positions`, None without a layout."""
    suffix_cu_seqlens: torch.Tensor | None = None
    """Likewise `SuffixLayout.cu_seqlens`."""

    def count_ahead(self, distance: int) -> int:
        """How many positions with a label have a token of their chunk `distance` >= 1 ahead. Does not wait for the device."""
        if self.answers_only:
            return int((self.tokens_left >= distance).sum())
        return int((self.chunk_labels - (distance - 1)).clip(min=0).sum())

    def count_labels_ahead(self, distance: int) -> int:
        """As `count_ahead`, but of positions for which that token counts too."""
        if not self.answers_only:
            return self.count_ahead(distance)
        chunks = np.repeat(np.arange(len(self.chunk_labels)), self.chunk_labels)
        keys = chunks * self.input_ids.shape[1] + self.tokens_left - 1
        inside = self.tokens_left >= distance
        return int(np.isin(keys[inside] - (distance - 1), keys).sum())

    def sum_labels(self, distance: int = 1) -> torch.Tensor:
        """`num_labels`, or `count_labels_ahead` of a distance of 2 or more, from the tensors: int64 0-d, on the device."""
        marks, chunks = self.labels[0] != NO_LABEL, self.segment_ids[0]
        end = max(len(marks) - (distance - 1), 0)
        return (marks[:end] & marks[distance - 1 :] & (chunks[:end] == chunks[distance - 1 :])).sum()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return a copy with all tensors on `device`."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return a copy with all tensors in page-locked memory, from which `to` can copy without blocking."""
        return self._map_tensors(torch.Tensor.pin_memory)

    def _map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **changed)


def build_batch(sequence: PackedSequence, sequence_index: int) -> PackedBatch:
    """Derive labels, positions and segments of a packed sequence."""
    starts, ends = sequence.cu_seqlens[:-1], sequence.cu_seqlens[1:]
    lengths = ends.astype(np.int64) - starts
    input_ids = sequence.input_ids
    own: dict[str, Any] = {}
    if sequence.label_spans is None:
        chunk_labels = lengths - 1
        labels = np.append(input_ids[1:], NO_LABEL)
        labels[ends - 1] = NO_LABEL
    else:
        labelled = list_positions(sequence.label_spans) - 1
        labels = np.full_like(input_ids, NO_LABEL)
        labels[labelled] = input_ids[labelled + 1]
        chunks = np.searchsorted(ends, labelled, side="right")
        chunk_labels = np.bincount(chunks, minlength=len(ends))
        with_labels, first = np.unique(chunks, return_index=True)
        answers = np.stack([labelled[first], ends[with_labels].astype(np.int64)], axis=1)
        suffixes = lay_out_suffixes(answers, len(input_ids))
        own = {
            "answers_only": True,
            "answers": answers,
            "tokens_left": ends[chunks] - 1 - labelled,
            "num_predicted": round_up_to_bucket(len(labelled), len(input_ids)),
            "suffix_positions": None if suffixes is None else suffixes.positions,
            "suffix_cu_seqlens": None if suffixes is None else suffixes.cu_seqlens,
        }
    positions = np.arange(len(input_ids), dtype=np.int64) - np.repeat(starts, lengths)
    segments = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(positions)[None],
        segment_ids=torch.from_numpy(segments)[None],
        cu_seqlens=torch.from_numpy(sequence.cu_seqlens),
        number=torch.tensor(sequence_index),
        sequence_index=sequence_index,
        num_labels=int(chunk_labels.sum()),
        chunk_labels=chunk_labels,
        source=sequence.source,
        stream=sequence.stream,
        cursor=sequence.cursor,
        documents=sequence.documents,
        bad_rows=sequence.bad_rows,
        **own,
    )
