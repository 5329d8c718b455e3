"""Log-probabilities of texts under the model, many texts in a packed sequence.

The texts are packed in the order of their length, so that those of one sequence are alike, and the sequences are dealt to the
ranks in turn. A sequence is the same on any number of ranks, and so are the sums. Documents of a packed sequence do not see each
other, so a text has the same log-probability as alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flame.data.batch import PackedBatch, build_batch
from flame.data.document_streams import Cursor
from flame.data.packing import PackedSequence
from flame.evaluation.texts import ScoredText
from flame.models.wrapper import TrainingModel
from flame.runtime.distributed import sum_over_ranks


class Scores(NamedTuple):
    """Of N texts, in their order."""

    log_probs: np.ndarray
    """float64 [N], in nats: sum over the scored tokens."""
    is_greedy: np.ndarray
    """bool [N]: each scored token has the highest logit."""


class _Row(NamedTuple):
    """One packed sequence of texts."""

    batch: PackedBatch
    positions: Tensor
    """int64 [n], of the tokens that predict the scored ones."""
    targets: Tensor
    """int64 [n], the scored tokens."""
    owners: Tensor
    """int64 [n], index of the text."""


class Scorer:
    """Packs texts once, and scores them under a model as often as it is asked.

    Args:
        texts: at most `context_len` inputs each.
        seq_len: tokens of a packed sequence, as in training: then nothing is compiled anew, and the memory is known to suffice.
    """

    def __init__(
        self, texts: Sequence[ScoredText], seq_len: int, context_len: int, rank: int, world_size: int, device: torch.device
    ):
        self._num_texts, self._device = len(texts), device
        packed = pack_by_length([text.num_inputs for text in texts], seq_len)
        self._rows = [_build_row(texts, row, seq_len, context_len) for row in packed[rank::world_size]]
        # All ranks must run each forward together. A rank without a sequence left runs one that does not count.
        self._rounds = -(-len(packed) // world_size)
        self._filler = build_packed([], seq_len, context_len)

    def score(self, model: TrainingModel, is_stopped: Callable[[], bool]) -> Scores | None:
        """Score the texts under the model, which is in evaluation mode. All ranks call it.

        Args:
            is_stopped: called before each packed sequence. If it returns True on any rank, all ranks stop.

        Returns:
            the scores of the texts of all ranks, on each rank; None if stopped.
        """
        totals = torch.zeros(2, self._num_texts, dtype=torch.float64, device=self._device)
        with torch.no_grad():
            for turn in range(self._rounds):
                (votes,) = sum_over_ranks(is_stopped())
                if votes:
                    return None
                if turn >= len(self._rows):
                    model(_encode, self._filler.to(self._device))
                    continue
                row = self._rows[turn]
                found = model(_score, row.batch.to(self._device), row.positions.to(self._device), row.targets.to(self._device))
                totals.index_add_(1, row.owners.to(self._device), found)
        sums = totals.cpu()
        dist.all_reduce(sums)  # each text is of one rank, so nothing is rounded
        return Scores(sums[0].numpy(), sums[1].numpy() == 0)


def _encode(model: TrainingModel, batch: PackedBatch) -> None:
    model.encode_past(batch)


def _score(model: TrainingModel, batch: PackedBatch, positions: Tensor, targets: Tensor) -> Tensor:
    """float64 [2, n]: log-probabilities of the targets, and 1 where another token has a higher logit."""
    rows = model.output_head.score_labels(model.encode_past(batch)[positions], targets)
    return torch.stack([-rows.loss.double(), 1 - rows.is_best.double()])


def pack_by_length(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Indices of the texts of each packed sequence, longest first. Each text is at most `seq_len` long."""
    rows: list[list[int]] = []
    free = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if lengths[index] > free:
            rows.append([])
            free = seq_len
        rows[-1].append(index)
        free -= lengths[index]
    return rows


def build_packed(documents: Sequence[np.ndarray], seq_len: int, context_len: int) -> PackedBatch:
    """Pack documents, integer [n] each, into one sequence. Documents of padding fill it."""
    filled = sum(map(len, documents))
    lengths = [*map(len, documents), *_split(seq_len - filled, context_len)]
    input_ids = np.zeros(seq_len, dtype=np.int64)
    if documents:
        input_ids[:filled] = np.concatenate(documents)
    cu_seqlens = np.asarray([0, *np.cumsum(lengths)], dtype=np.int32)
    return build_batch(PackedSequence(input_ids, cu_seqlens, "evaluation", 0, Cursor(0, 0, 0, 0), [], 0), 0)


def _split(count: int, largest: int) -> Iterator[int]:
    while count > 0:
        yield min(count, largest)
        count -= largest


def _build_row(texts: Sequence[ScoredText], indices: list[int], seq_len: int, context_len: int) -> _Row:
    chosen = [texts[index] for index in indices]
    ends = np.cumsum([text.num_inputs for text in chosen])
    positions = np.concatenate([np.arange(end - text.num_scored, end) for text, end in zip(chosen, ends, strict=True)])
    targets = np.concatenate([text.ids[-text.num_scored :] for text in chosen]).astype(np.int64)
    owners = np.repeat(np.asarray(indices), [text.num_scored for text in chosen])
    batch = build_packed([text.ids[:-1] for text in chosen], seq_len, context_len)
    return _Row(batch, torch.from_numpy(positions), torch.from_numpy(targets), torch.from_numpy(owners))
