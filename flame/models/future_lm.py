"""The trained whole: a causal language model, the predictor of its future, and the estimator that scores the prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flame.config import JobConfig
from flame.data.batch import PackedBatch
from flame.models.causal_lm import build_on_meta
from flame.models.future_encoder import choose_passes
from flame.models.future_predictor import FuturePredictorHead
from flame.models.mi_estimator import InfoNCEEstimator, build_mi_estimator

T = TypeVar("T")


class FutureLM(nn.Module):
    """Owner of every trained parameter, and the one root through which FSDP is entered.

    `predictor` and `estimator` are None in a run without future loss.
    """

    def __init__(self, lm: PreTrainedModel, predictor: FuturePredictorHead | None, estimator: InfoNCEEstimator | None):
        super().__init__()
        self.lm = lm
        self.predictor = predictor
        self.estimator = estimator
        self._passes = choose_passes(lm.config)

    def forward(self, step: Callable[..., T], *args) -> T:
        """Run `step(self, *args)` with the root's weights gathered.

        FSDP gathers weights when a module's forward is entered. A step reads the output embedding and runs the backbone twice,
        so all of it has to happen inside this one forward.
        """
        return step(self, *args)

    def encode_past(self, batch: PackedBatch) -> Tensor:
        """Causal forward: final hidden states [T, d]."""
        return self._passes.encode_past(self.lm, batch)

    def encode_future(self, batch: PackedBatch, window_k: int) -> Tensor:
        """Anti-causal forward: summaries [T, d] of each position's future, with `future_encoder.future_k` as window."""
        return self._passes.encode_future(self.lm, batch, window_k)

    @property
    def output_embedding(self) -> Tensor:
        """[V, d]."""
        return self.lm.get_output_embeddings().weight


def build_future_lm(config: JobConfig, model_config: PretrainedConfig, device_type: str) -> FutureLM:
    """The modules of a run, on meta.

    Args:
        device_type: "cuda" or "cpu", which decides the attention implementation.
    """
    lm = build_on_meta(model_config, device_type)
    if config.experimental.freeze_lm_for_infonce:
        lm.requires_grad_(False)
    if not config.uses_future:
        return FutureLM(lm, None, None)
    hidden_size, future = model_config.hidden_size, config.future_encoder
    with torch.device("meta"):
        predictor = FuturePredictorHead(hidden_size, config.future_predictor.head_type, config.future_predictor.dropout)
        estimator = build_mi_estimator(future.estimator_type, hidden_size, future.temperature, future.learnable_temperature)
    return FutureLM(lm, predictor, estimator)
