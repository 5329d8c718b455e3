"""Next implicit token prediction (NITP; Zhang et al. 2026, arXiv:2605.24956).

The final state h_t predicts the implicit token: the state z_{t+1} of the next token after an early decoder layer, which the same
forward has computed. It is a label and carries no gradient. With a projector P,

    L = 1 - cos(P(h_t), z_{t+1}),      P(h) = W_3 (silu(W_1 h) * W_2 h)   from width d to 4 d and back.

The paper adds L to next-token prediction with factor 1, and reads a layer at about a fifth of the depth. h_t is the state after
the final norm, z that of the residual stream after the layer. Both are choices of this repository, as is that the matrices of P
have no bias. If only some tokens count (`training.loss_on`), only those are predicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from flame.data.batch import NO_LABEL, PackedBatch
from flame.models.flops import ModelFlops, count_matrix_weights, count_predicted
from flame.models.layer_states import choose_shallow_depth
from flame.models.wrapper import TrainingModel
from flame.objectives.base import AuxFlops, AuxLoss, Objective, Setup, WithLayer
from flame.objectives.future.representations import ProbeSample, measure_representations
from flame.objectives.nitp.options import ImplicitTokenOptions
from flame.objectives.step import list_predicted, pick
from flame.runtime.measures import Mean, Measures

SHARE_OF_DEPTH = 0.2
"""Where the target layer is, by default."""
EXPANSION = 4
"""Inner width of the projector, in widths of the model."""
KEPT_WIDTHS, BFLOAT16_BYTES = 3 * EXPANSION + 4, 2
"""Vectors of the model's width kept for each token: inside the projector, its output, the target and their gradients."""


class Projector(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202, section 2) from width d to 4 d and back to d."""

    def __init__(self, width: int):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, EXPANSION * width, bias=False) for _ in range(2))
        self.down = nn.Linear(EXPANSION * width, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """[n, d] -> [n, d]"""
        return self.down(F.silu(self.gate(states)) * self.up(states))


class ImplicitTokenPrediction(Objective):
    """The projector and its loss."""

    name: ClassVar[str] = "nitp"
    Options: ClassVar[type[ImplicitTokenOptions]] = ImplicitTokenOptions

    def __init__(self, setup: Setup):
        super().__init__(setup)
        assert isinstance(setup.options, ImplicitTokenOptions)
        config = setup.lm.config
        self.depth = setup.options.layer or choose_shallow_depth(config.num_hidden_layers, SHARE_OF_DEPTH)
        with torch.device("meta"):
            self.projector = Projector(config.hidden_size)

    @classmethod
    def find_model_conflicts(cls, options: ImplicitTokenOptions, config: PretrainedConfig) -> Iterator[str]:  # type: ignore[override]
        if options.layer > config.num_hidden_layers:
            yield f"nitp.layer = {options.layer}: the model has {config.num_hidden_layers} decoder layers; 0 chooses one"

    def find_future_pass(self) -> None:
        """None: the causal pass is all that is read."""

    def find_layer_read(self) -> int:
        return self.depth

    @property
    def fits_graph(self) -> bool:
        return True

    def loss(
        self,
        backbone: TrainingModel,
        hidden_states: Tensor,
        batch: PackedBatch,
        prepared: WithLayer,
        *,
        with_sample: bool = False,
    ) -> AuxLoss:
        positions = list_predicted(batch)
        here = torch.arange(len(hidden_states), device=hidden_states.device) if positions is None else positions
        is_counted = batch.labels[0][here] != NO_LABEL  # the next token is in the same document, and counts
        targets = prepared.states[(here + 1).clamp(max=len(hidden_states) - 1)]
        states = pick(hidden_states, positions)
        predictions = self.projector(states)
        wide = torch.promote_types(predictions.dtype, torch.float32)
        cosines = torch.where(is_counted, F.cosine_similarity(predictions.to(wide), targets.to(wide), dim=-1), 0.0)
        count = batch.sum_labels().to(cosines.dtype)
        total = cosines.sum()
        measures: Measures = {"nitp_cosine": Mean(total.detach(), count)}
        sample = None
        if with_sample:
            sample = ProbeSample(states.detach(), predictions.detach(), targets, here, is_counted)
        loss_sum = (is_counted.to(wide) - cosines).sum()
        return AuxLoss(loss_sum, count, torch.zeros_like(count), measures, sample)

    def list_compiled(self) -> list[nn.Module]:
        return [self.projector]

    def count_flops(self, batch: PackedBatch, model: ModelFlops) -> AuxFlops:
        return AuxFlops(heads=6.0 * count_matrix_weights(self.projector) * count_predicted(batch))

    def estimate_memory(self, tokens: int) -> float:
        return float(KEPT_WIDTHS * tokens * self.setup.lm.config.hidden_size * BFLOAT16_BYTES)

    def measure_sample(self, sample: ProbeSample, batch: PackedBatch, seed: int) -> dict[str, Mean]:
        return measure_representations(sample, batch, target_shift=1, seed=seed)
