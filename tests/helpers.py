"""Small models and packs that the tests share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
from packaging.version import Version
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from flame.config import JobConfig
from flame.data.batch import PackedBatch, build_batch
from flame.data.lines import Cursor
from flame.data.streams import PackedSequence
from flame.models.future_lm import FutureLM, build_future_lm
from flame.models.parallelize import materialize
from flame.objective_config import FutureEncoder

CPU = torch.device("cpu")
needs_interpreter = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.5"),
    reason="beside numpy 2.5 the interpreter of Triton 3.6, which torch 2.11 brings, fails on the row kernel and on that of gla",
)


def tiny_llama(**changes) -> PretrainedConfig:
    """Two layers, grouped heads, tied embeddings."""
    return LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 61,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            **changes,
        }
    )


def future_config(**changes) -> JobConfig:
    return JobConfig(future_encoder=FutureEncoder(**{"enable": True, **changes}))


def build_unsharded(config: JobConfig, model_config: PretrainedConfig | None = None, seed: int = 0) -> FutureLM:
    """The modules of a run on one CPU process, without FSDP."""
    model = build_future_lm(config, model_config or tiny_llama(), "cpu")
    materialize(model, CPU, seed)
    return model


def random_cu_seqlens(total: int, pieces: int, seed: int) -> Tensor:
    """int32 [S+1] of at most `pieces` documents over `total` tokens, some of them single tokens."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(1, total, (pieces - 1,), generator=generator).unique()
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([total])]).to(torch.int32)


def random_batch(cu_seqlens: Tensor, vocab_size: int = 61, seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, vocab_size, (int(cu_seqlens[-1]),), generator=generator)
    return pack(input_ids, cu_seqlens)


def pack(input_ids: Tensor, cu_seqlens: Tensor) -> PackedBatch:
    """The batch of given tokens, int64 [T], and boundaries, int32 [S+1]."""
    sequence = PackedSequence(input_ids.numpy(), cu_seqlens.numpy(), "text", 0, Cursor(0, 0, 0, 0), [], 0)
    return build_batch(sequence, sequence_index=0)
