"""Packed batches of benchmarks: random tokens in documents of random lengths, or given documents.

The random layout depends on its arguments alone, so that figures from different programs can be compared.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from flame.data.batch import PackedBatch, build_batch
from flame.data.document_streams import Cursor
from flame.data.packing import PackedSequence

MEAN_LENGTH = 1024
LONGEST = 4096


def draw_cu_seqlens(total: int, mean: int = MEAN_LENGTH, longest: int = LONGEST, seed: int = 0) -> Tensor:
    """Boundaries of documents that fill `total` tokens, int32 [S+1] on the CPU.

    Args:
        mean: of the exponential distribution that lengths are drawn from, before they are capped.
        longest: cap of a length, in tokens. The last document is cut at `total`.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = [0]
    while ends[-1] < total:
        length = 1 + int(torch.empty(1).exponential_(1 / mean, generator=generator))
        ends.append(min(total, ends[-1] + min(longest, length)))
    return torch.tensor(ends, dtype=torch.int32)


def draw_batch(total: int, vocab_size: int, seed: int = 0, *, mean: int = MEAN_LENGTH, longest: int = LONGEST) -> PackedBatch:
    """Uniformly random tokens in the layout of `draw_cu_seqlens(total, mean, longest, seed)`, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (total,), generator=generator)
    return _pack(tokens, draw_cu_seqlens(total, mean, longest, seed))


def pack_documents(documents: Sequence[Tensor]) -> PackedBatch:
    """Whole documents, int64 [tokens] each, on the CPU."""
    lengths = torch.tensor([0, *map(len, documents)])
    return _pack(torch.cat(list(documents)), lengths.cumsum(0).int())


def _pack(tokens: Tensor, cu_seqlens: Tensor) -> PackedBatch:
    sequence = PackedSequence(tokens.numpy(), cu_seqlens.numpy(), "given", 0, Cursor(0, 0, 0, 0), [], 0)
    return build_batch(sequence, sequence_index=0)


def write_corpus(path: Path, total: int, seed: int = 0) -> None:
    """Write JSON lines of random letters, documents of the lengths of `draw_cu_seqlens`, about `total` characters in all."""
    generator = random.Random(seed)
    bounds = draw_cu_seqlens(total, seed=seed).tolist()
    with path.open("w") as file:
        for start, end in pairwise(bounds):
            text = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz ", k=end - start))
            file.write(json.dumps({"text": text}) + "\n")
