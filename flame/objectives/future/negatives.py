"""Negatives from all packed sequences of a step, over all ranks and micro-steps.

Summaries are labels, so they are gathered without gradient. One rank with four packed sequences has the same candidates as two
ranks with two each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flame.models.estimator import Candidates


class LocalCandidates(NamedTuple):
    """The candidates of one packed sequence. All sequences that are gathered have the same n."""

    summaries: Tensor
    """[n, width], from `Estimator.encode_targets`."""
    is_valid: Tensor
    """bool [n]"""
    keys: Tensor | None
    """int64 [n], see `Candidates`."""

    def list_candidates(self, excluded: tuple[Tensor, Tensor] | None) -> Candidates:
        """Candidates if the anchors of this sequence are compared only with each other."""
        own = torch.arange(len(self.is_valid), device=self.is_valid.device)
        return Candidates(self.summaries, self.is_valid, own, excluded, self.keys)


class GlobalCandidates(NamedTuple):
    """The candidates of all packed sequences (K = n times their number), and the range that belongs to one sequence."""

    whole: LocalCandidates
    first: int
    """Index of the first candidate of the sequence."""
    size: int
    """n"""

    def list_candidates(self, excluded: tuple[Tensor, Tensor] | None) -> Candidates:
        """Candidates for the anchors of this sequence.

        Args:
            excluded: as in `Candidates`, but indices within the sequence.
        """
        whole = self.whole
        own = torch.arange(self.first, self.first + self.size, device=whole.is_valid.device)
        if excluded is not None:
            excluded = excluded[0] + self.first, excluded[1] + self.first
        return Candidates(whole.summaries, whole.is_valid, own, excluded, whole.keys)


def gather_candidates(own: list[LocalCandidates]) -> list[GlobalCandidates]:
    """Gather the candidates of all ranks. A collective call; all ranks pass equally many, of equal n.

    Returns:
        all candidates, for each packed sequence of this rank.
    """
    size = len(own[0].is_valid)
    summaries, is_valid, keys = zip(*own, strict=True)
    whole = LocalCandidates(
        _gather(torch.cat(summaries)), _gather(torch.cat(is_valid)), None if keys[0] is None else _gather(torch.cat(keys))
    )
    before = dist.get_rank() * len(own)
    return [GlobalCandidates(whole, (before + micro_step) * size, size) for micro_step in range(len(own))]


def agree_on_size(size: int, device: torch.device) -> int:
    """The largest `size` of all ranks. A collective call that waits for the device."""
    largest = torch.tensor(size, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def _gather(rows: Tensor) -> Tensor:
    """[m, ...] of each rank -> [ranks x m, ...], in the order of ranks."""
    gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered
