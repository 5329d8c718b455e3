"""Small models of several families as Hugging Face folders, and comparisons of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from flame.models.causal_lm import build_on_meta
from flame.models.wrapper import TrainingModel
from flame.trainer.setup import materialize
from tests.support.families import build_toy
from tests.support.models import CPU, tiny_llama


def tiny_moe() -> PretrainedConfig:
    """Five experts, which two and three ranks cannot share evenly."""
    return Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=5,
        num_experts_per_tok=2,
        vocab_size=61,
        max_position_embeddings=256,
    )


CONFIGS: dict[str, Any] = {
    "phi": lambda: PhiConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=61,
        max_position_embeddings=256,
    ),
    "llama-tied": tiny_llama,
    "llama-untied": lambda: tiny_llama(tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "qwen3_moe": tiny_moe,
    "gpt_oss": lambda: build_toy("gpt_oss"),
    "deepseek_v2": lambda: build_toy("deepseek_v2"),
    "deepseek_v3": lambda: build_toy("deepseek_v3"),
    "gpt_neox": lambda: GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=61,
        max_position_embeddings=256,
    ),
}


def list_saved_buffers(model: PreTrainedModel) -> list[torch.Tensor]:
    """Those that are saved with the weights, such as the correction of a router's scores."""
    saved = model.state_dict(keep_vars=True)
    return [buffer for name, buffer in model.named_buffers() if name in saved]


def save_reference(folder: Path, family: str, dtype: torch.dtype = torch.float32, shard_size: str = "50GB") -> PreTrainedModel:
    """Save a model with every tensor drawn at random, and return it as transformers reads it back."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).to(dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *list_saved_buffers(model)):
            tensor.normal_()
    model.save_pretrained(folder, max_shard_size=shard_size)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def build_on_meta_here(config: PretrainedConfig) -> TrainingModel:
    """A model that is not run: whether its family can be trained does not matter."""
    return TrainingModel(build_on_meta(config, "cpu", "none"), None)  # type: ignore[arg-type]


def build(config: PretrainedConfig) -> TrainingModel:
    """A model as a run on one process has it before it loads weights."""
    model = build_on_meta_here(config)
    materialize(model, CPU, 0)
    return model


def assert_same_weights(lm: PreTrainedModel, reference: PreTrainedModel) -> None:
    expected = reference.state_dict()
    found = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in lm.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name
