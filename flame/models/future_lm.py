"""The trained whole: a causal language model, the predictor of its future, and the estimator that scores the prediction."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flame.config import JobConfig
from flame.data.batch import PackedBatch
from flame.models.causal_lm import build_on_meta, find_decoder_layers
from flame.models.fp8 import Fp8Switch, check_fp8, install_fp8
from flame.models.future_encoder import Passes, build_passes, choose_attention
from flame.models.future_predictor import FuturePredictorHead
from flame.models.mi_estimator import InfoNCEEstimator, build_mi_estimator

T = TypeVar("T")


class FutureLM(nn.Module):
    """Owner of every trained parameter, and the one root through which FSDP is entered.

    `predictor` and `estimator` are None in a run without future loss.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        passes: Passes,
        predictor: FuturePredictorHead | None = None,
        estimator: InfoNCEEstimator | None = None,
        fp8: Fp8Switch | None = None,
    ):
        super().__init__()
        self.lm = lm
        self.predictor = predictor
        self.estimator = estimator
        self._passes = passes
        self._fp8 = fp8

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
        with self._fp8.on() if self._fp8 is not None else nullcontext():
            return self._passes.encode_future(self.lm, batch, window_k)

    def describe_attention(self) -> str:
        """What attends, for the log."""
        return self._passes.describe()

    @property
    def output_embedding(self) -> Tensor:
        """[V, d]."""
        return self.lm.get_output_embeddings().weight


def build_future_lm(config: JobConfig, model_config: PretrainedConfig, device_type: str) -> FutureLM:
    """The modules of a run, on meta.

    Args:
        device_type: "cuda" or "cpu", which with the dtype decides the attention implementation.
    """
    attention = choose_attention(model_config, device_type, getattr(torch, config.training.mixed_precision_param))
    lm = build_on_meta(model_config, device_type, attention)
    passes = build_passes(attention, model_config, config.training.context_len)
    if config.experimental.freeze_lm_for_infonce:
        lm.requires_grad_(False)
    if not config.uses_future:
        return FutureLM(lm, passes)
    hidden_size, future, head = model_config.hidden_size, config.future_encoder, config.future_predictor
    fp8 = None
    if future.precision == "fp8":
        check_fp8(device_type)
        fp8 = install_fp8(find_decoder_layers(lm))
    with torch.device("meta"):
        predictor = FuturePredictorHead(hidden_size, head.head_type, head.dropout, future.projection_dim or hidden_size)
        estimator = build_mi_estimator(
            future.estimator_type, hidden_size, future.temperature, future.learnable_temperature, future.projection_dim
        )
    return FutureLM(lm, passes, predictor, estimator, fp8)
