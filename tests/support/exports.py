"""Small checkpoints to export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from flame.checkpoints.files import commit
from flame.checkpoints.manager import HF_FOLDER
from flame.checkpoints.resume import FORMAT
from flame.config.schema import JobConfig
from flame.data.state import DataState
from flame.data.tokenizer import build_bytes_tokenizer
from flame.logging.counters import Counters
from tests.support.weights import list_saved_buffers


def build_model(config: PretrainedConfig) -> PreTrainedModel:
    """As the library makes it, but nothing zero or one: a mixed-up norm or bias would show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in (*model.parameters(), *list_saved_buffers(model)):
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    tokenizer = build_bytes_tokenizer()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model


def make_checkpoint(folder: Path, model: PreTrainedModel, custom_model_path: str = "", **predictor: torch.Tensor) -> Path:
    """A committed checkpoint of a model, as one rank's trainer leaves it."""
    partial = folder / "checkpoint" / "step-3.partial"
    tensors = {f"lm.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    tensors |= {f"objective.predictor.{name}": tensor for name, tensor in predictor.items()}
    optimizer = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    dcp.save({"model": tensors, "optimizer": optimizer}, checkpoint_id=partial, no_dist=True)
    model.config.save_pretrained(partial / HF_FOLDER)
    build_bytes_tokenizer().save_pretrained(partial / HF_FOLDER)
    config = JobConfig()
    config.job.dump_folder = str(folder)
    config.experimental.custom_model_path = custom_model_path
    state = {
        "step": 3,
        "world_size": 1,
        "validated_step": 0,
        "counters": asdict(Counters(tokens_seen=1000)),
        "data": DataState(192, 0).state_dict(),
        "service_ids": {},
        "generation": {},
        "tokenizer_fingerprint": "",
        "config": config.to_dict(),
        "format": FORMAT,
        "model_config": model.config.to_dict(),
        "objective": {"name": "future", "exported": ["predictor."], "description": "Trained.", "modules": "its modules"}
        if predictor
        else None,
    }
    commit(partial, partial.with_suffix(""), state)
    return partial.with_suffix("")
