"""Checks the packed sequence that a caller gives, and derives what the passes need."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True, eq=False)
class Pack:
    """T tokens in S documents, on the model's device. No document is empty."""

    input_ids: Tensor
    """int64 [1, T]"""
    position_ids: Tensor
    """int64 [1, T]: from 0 in each document."""
    segment_ids: Tensor
    """int32 [1, T]: number of each token's document."""
    cu_seqlens: Tensor
    """int32 [S+1], from 0 to T."""
    longest: int
    """Tokens of the longest document; 0 if there is no document."""

    @property
    def total(self) -> int:
        """T"""
        return self.input_ids.shape[1]

    def list_next_tokens(self) -> Tensor:
        """int64 [T]: the next token of the same document, -100 at the last one of each."""
        labels = self.input_ids[0].roll(-1)
        return labels.index_fill(0, self.cu_seqlens[1:].long() - 1, IGNORED_LABEL)


def read_pack(input_ids: Tensor, cu_seqlens: Tensor, device: torch.device, vocab_size: int) -> Pack:
    """Check a packed sequence and move it to a device. Waits for the device that `cu_seqlens` is on.

    Args:
        input_ids: integers [T] or [1, T].
        cu_seqlens: int32 or int64 [S+1] or [1, S+1], from 0 to T. Repeated boundaries, which some packers use as padding, are
            empty documents and dropped.
        vocab_size: of the model.

    Raises:
        ValueError: the arguments do not fit together, or do not fit the model.
    """
    tokens = _flatten(input_ids, "input_ids", "[T] or [1, T]")
    edges = _flatten(cu_seqlens, "cu_seqlens", "[S+1] or [1, S+1]").tolist()
    if not edges or edges[0] != 0:
        raise ValueError(f"cu_seqlens must begin with 0, and is {_show(edges)}")
    if any(end < start for start, end in pairwise(edges)):
        raise ValueError(f"cu_seqlens must not fall, and is {_show(edges)}")
    if edges[-1] != len(tokens):
        raise ValueError(f"cu_seqlens ends with {edges[-1]}, but input_ids holds {len(tokens)} tokens: they must be equal")
    tokens = tokens.to(device, torch.long)
    if len(tokens) and not tokens.is_cuda and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        raise ValueError(f"input_ids holds {int(tokens.min())} to {int(tokens.max())}: the model knows 0 to {vocab_size - 1}")
    kept = list(dict.fromkeys(edges))
    cu = torch.tensor(kept, dtype=torch.int32)
    lengths = cu.diff().long()
    segments = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)
    positions = torch.arange(len(tokens)) - torch.repeat_interleave(cu[:-1].long(), lengths)
    longest = int(lengths.max()) if len(lengths) else 0
    return Pack(tokens[None], positions[None].to(device), segments[None].to(device), cu.to(device), longest)


def _flatten(values: Tensor, name: str, shape: str) -> Tensor:
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} must be a tensor of integers {shape}, not {type(values).__name__}")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, not {values.dtype}")
    if values.ndim == 2 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 1:
        raise ValueError(f"{name} must have the shape {shape}, not {list(values.shape)}: give one packed sequence at a time")
    return values


def _show(edges: list[int]) -> str:
    return str(edges) if len(edges) <= 8 else f"[{', '.join(map(str, edges[:8]))}, ...]"
