"""The trained whole: a causal language model, and what learns from its hidden states beside the next token."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.config import JobConfig, Training
from flame.data.batch import PackedBatch
from flame.errors import UserError
from flame.models.causal_lm import build_on_meta, find_decoder_layers
from flame.models.fp8 import Fp8Switch, check_fp8, install_fp8
from flame.models.future_encoder import Attention, Passes, build_passes, choose_attention
from flame.models.future_predictor import FuturePredictorHead
from flame.models.mi_estimator import Estimator, build_mi_estimator
from flame.models.rivals import Rival, build_rival

T = TypeVar("T")

TAUGHT = ("random", "ema")
"""Values of `future_encoder.target` with a teacher."""


SHORTEST_FLEX = 128
"""Tokens. Torch has another kernel for shorter queries ("flex_decoding"), which under our masks in compiled layers gave wrong
results on 64 tokens, and on 127, compiled or not, none, but a traceback (torch 2.11, tests/test_gpu.py)."""


class FutureLM(nn.Module):
    """Owner of every parameter, and the one root through which FSDP is entered.

    `predictor` and `estimator` are None in a run without future loss, `rival` in one without another objective. `teacher` is the
    network that sums up the future where it is not the language model itself; it is never trained.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        passes: Passes,
        predictor: FuturePredictorHead | None = None,
        estimator: Estimator | None = None,
        rival: Rival | None = None,
        teacher: PreTrainedModel | None = None,
        fp8: Fp8Switch | None = None,
    ):
        super().__init__()
        self.lm = lm
        self.predictor = predictor
        self.estimator = estimator
        self.rival = rival
        self.teacher = teacher
        self._passes = passes
        self._fp8 = fp8

    def forward(self, step: Callable[..., T], *args: Any) -> T:
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
            return self._passes.encode_future(self.lm if self.teacher is None else self.teacher, batch, window_k)

    def encode_embeddings(self, part: PreTrainedModel, embeddings: Tensor, batch: PackedBatch) -> Tensor:
        """Causal forward of a few layers of the same family over embeddings [T, d]: hidden states [T, d]."""
        return self._passes.encode_past(part, batch, embeddings)

    @property
    def heads(self) -> list[nn.Module]:
        """What is trained beside the language model."""
        return [module for module in (self.predictor, self.estimator, self.rival) if module is not None]

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """Move the teacher's weights to `decay` of themselves and 1 - decay of the language model's."""
        assert self.teacher is not None
        averages, weights = list(self.teacher.parameters()), list(self.lm.parameters())
        torch._foreach_lerp_(_get_local(averages), _get_local(weights), 1 - decay)

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

    Raises:
        UserError: the model cannot be built, or not run on packed sequences that short.
    """
    attention = choose_attention(model_config, device_type, getattr(torch, config.training.mixed_precision_param))
    _check_length(attention, config.training)
    lm = build_on_meta(model_config, device_type, attention)
    passes = build_passes(attention, model_config, config.training.context_len, config.training.compile)
    if config.experimental.freeze_lm_for_infonce:
        lm.requires_grad_(False)
    if config.objective_name in ("mtp", "top", "fsp_bow"):
        return FutureLM(lm, passes, rival=build_rival(config.objective_name, config, model_config, attention))
    if not config.uses_future:
        return FutureLM(lm, passes)
    teacher = None
    if config.future_encoder.target in TAUGHT:
        teacher = build_on_meta(model_config, device_type, attention).requires_grad_(False)
    hidden_size, future, head = model_config.hidden_size, config.future_encoder, config.future_predictor
    fp8 = None
    if future.precision == "fp8":
        check_fp8(device_type)
        fp8 = install_fp8(find_decoder_layers(lm if teacher is None else teacher))
    with torch.device("meta"):
        predictor = FuturePredictorHead(hidden_size, head.head_type, head.dropout, future.projection_dim or hidden_size)
        estimator = build_mi_estimator(
            future.estimator_type, hidden_size, future.temperature, future.learnable_temperature, future.projection_dim
        )
    return FutureLM(lm, passes, predictor, estimator, teacher=teacher, fp8=fp8)


def _check_length(attention: Attention, training: Training) -> None:
    if attention == "flex" and training.seq_len < SHORTEST_FLEX:
        raise UserError(
            f"training.seq_len = {training.seq_len}: this model attends by FlexAttention, which is right only on packed "
            f"sequences of {SHORTEST_FLEX} tokens or more: raise it"
        )


def _get_local(tensors: list[nn.Parameter]) -> list[Tensor]:
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
