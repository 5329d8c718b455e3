"""Small models and packs that the tests share."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
from packaging.version import Version
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig, PretrainedConfig

from flame.config.run import ObjectiveChoice
from flame.config.schema import JobConfig
from flame.config.types import Section
from flame.data.batch import PackedBatch, build_batch
from flame.data.document_streams import Cursor
from flame.data.packing import PackedSequence
from flame.logging.throughput import Flops
from flame.models.flops import ModelFlops
from flame.models.parallelize import parallelize
from flame.models.wrapper import TrainingModel
from flame.objectives.base import Objective
from flame.objectives.future.options import FutureOptions
from flame.objectives.step import get_objective
from flame.trainer.setup import build_modules, materialize

CPU = torch.device("cpu")
needs_interpreter = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.5"),
    reason="beside numpy 2.5 the interpreter of Triton 3.6, which torch 2.11 brings, fails on the row kernel and on that of gla",
)


WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192, "head_dim": 32}
"""Sizes of a `tiny_llama` that all attention kernels of a GPU take."""


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


def configure(*extensions: Section, **sections: object) -> JobConfig:
    """A configuration with some sections of its own, those of objectives and sources first."""
    return JobConfig(**sections, extensions={each.section: each for each in extensions})  # type: ignore[arg-type]


def future_config(*further: Section, **changes) -> JobConfig:
    """With the future loss, under these options of [future_encoder], and further sections."""
    return configure(FutureOptions(**changes), *further, objective=ObjectiveChoice(name="future"))


def build_unsharded(config: JobConfig, model_config: PretrainedConfig | None = None, seed: int = 0) -> TrainingModel:
    """The modules of a run on one CPU process, without FSDP."""
    model = build_modules(config, model_config or tiny_llama(), "cpu")
    materialize(model, CPU, seed)
    return model


def shard(model: TrainingModel, config: JobConfig, mesh: DeviceMesh, seed: int = 0) -> TrainingModel:
    """Modules on meta, under FSDP on CPU processes."""
    objective = get_objective(model)
    stacks, compiled = (objective.list_layer_stacks(), objective.list_compiled()) if objective is not None else ([], [])
    parallelize(model, stacks, compiled, config.training, config.activation_checkpoint.mode, mesh)
    materialize(model, CPU, seed)
    return model


def get_own(model: TrainingModel) -> Objective:
    """The objective of a model that has one."""
    objective = get_objective(model)
    assert objective is not None
    return objective


def count_flops(model: TrainingModel, batch: PackedBatch) -> Flops:
    """Arithmetic of a packed sequence with both losses."""
    counter = ModelFlops(model.lm)
    return Flops(counter.count_next_token(batch, is_frozen=False), *get_own(model).count_flops(batch, counter))


def random_cu_seqlens(total: int, chunks: int, seed: int) -> Tensor:
    """int32 [S+1] of at most `chunks` documents over `total` tokens, some of them single tokens."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(1, total, (chunks - 1,), generator=generator).unique()
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([total])]).to(torch.int32)


def random_batch(cu_seqlens: Tensor, vocab_size: int = 61, seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, vocab_size, (int(cu_seqlens[-1]),), generator=generator)
    return pack(input_ids, cu_seqlens)


def pack(input_ids: Tensor, cu_seqlens: Tensor) -> PackedBatch:
    """The batch of given tokens, int64 [T], and boundaries, int32 [S+1]."""
    sequence = PackedSequence(input_ids.numpy(), cu_seqlens.numpy(), "text", 0, Cursor(0, 0, 0, 0), [], 0)
    return build_batch(sequence, sequence_index=0)


class RunningMean(torch.nn.Module):
    """A recurrence with the interface of flash-linear-attention's models: state t is the mean of its document up to t."""

    def forward(self, input_ids, cu_seqlens, use_cache):
        x = torch.nn.functional.one_hot(input_ids[0], 61).double()
        chunks = [x[a:b].cumsum(0) / torch.arange(1, b - a + 1)[:, None] for a, b in itertools.pairwise(cu_seqlens.tolist())]
        return SimpleNamespace(last_hidden_state=torch.cat(chunks)[None])
