"""Negatives from all packed sequences of a step: every rank's, in every micro-step.

Summaries are labels, so they travel as they are, with no gradient to send back. One rank with four packed sequences has the same
candidates as two ranks with two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flame.models.estimator import Candidates


class Share(NamedTuple):
    """The candidates of one packed sequence; n is the same for all that are put together."""

    summaries: Tensor
    """[n, width], as `Estimator.encode_targets` gives them."""
    is_valid: Tensor
    """bool [n]"""
    keys: Tensor | None
    """int64 [n], see `Candidates`."""

    def compare_with(self, excluded: tuple[Tensor, Tensor] | None) -> Candidates:
        """The candidates of anchors that are compared among themselves alone."""
        own = torch.arange(len(self.is_valid), device=self.is_valid.device)
        return Candidates(self.summaries, self.is_valid, own, excluded, self.keys)


class Pool(NamedTuple):
    """The candidates of all packed sequences, K = n times their number, and which of them are those of one sequence."""

    whole: Share
    first: int
    """Candidate of that sequence's first anchor."""
    size: int
    """n"""

    def compare_with(self, excluded: tuple[Tensor, Tensor] | None) -> Candidates:
        """The candidates of this sequence's anchors. excluded: as in `Candidates`, counted within the sequence."""
        whole = self.whole
        own = torch.arange(self.first, self.first + self.size, device=whole.is_valid.device)
        if excluded is not None:
            excluded = excluded[0] + self.first, excluded[1] + self.first
        return Candidates(whole.summaries, whole.is_valid, own, excluded, whole.keys)


def build_pools(shares: list[Share]) -> list[Pool]:
    """One pool for each of this rank's packed sequences. A collective call; all ranks have as many, of the same sizes."""
    size = len(shares[0].is_valid)
    summaries, is_valid, keys = zip(*shares, strict=True)
    whole = Share(
        _gather(torch.cat(summaries)), _gather(torch.cat(is_valid)), None if keys[0] is None else _gather(torch.cat(keys))
    )
    before = dist.get_rank() * len(shares)
    return [Pool(whole, (before + micro_step) * size, size) for micro_step in range(len(shares))]


def agree_on_size(size: int, device: torch.device) -> int:
    """The largest of all ranks. A collective call that waits for the device."""
    largest = torch.tensor(size, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def _gather(rows: Tensor) -> Tensor:
    """[m, ...] of each rank -> [ranks x m, ...], in the order of ranks."""
    gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered
