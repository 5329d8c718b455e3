"""Next-latent prediction (NextLat; Teoh et al. 2025, arXiv:2511.05963v4, section 3.2 and appendix C).

A dynamics model predicts the next final state from the state and the next token. It is rolled out over a horizon D with the true
tokens. With the MLP f, the embedding e and the next-token distribution p of the output head,

    g_t,0 = h_t,   g_t,i = g_t,i-1 + f(LayerNorm([g_t,i-1; e(x_{t+i})])),
    L = 1/D sum_{i=1..D} [ SmoothL1(g_t,i, sg[h_{t+i}]) + w KL(p(. | sg[h_{t+i}]) || p(. | g_t,i)) ].

SmoothL1 is the mean over the d channels, as in torch. In KL the output head is frozen: its gradient reaches the states and f
alone. f has three layers and GELUs. The paper adds both terms to next-token prediction with factor 1 in language modelling, and
its pseudocode has D = 1.

Here e is the model's own input embedding and learns too. Terms whose state would be in another document are left out, as in the
paper. All steps are divided by the number of positions that have a next state. If only some tokens count (`training.loss_on`), a
term needs x_{t+1} and x_{t+i} to count; the paper keeps the regression on prompts.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.data.batch import NO_LABEL, PackedBatch
from flame.kernels.divergence import linear_divergence
from flame.kernels.gradient_guard import guard_gradient
from flame.models.flops import ModelFlops, count_matrix_weights, count_predicted
from flame.models.wrapper import TrainingModel
from flame.objectives.base import AuxFlops, AuxLoss, Objective, Setup
from flame.objectives.future.representations import ProbeSample, measure_representations
from flame.objectives.nextlat.options import NextLatentOptions
from flame.objectives.step import list_predicted, pick
from flame.runtime.measures import Mean, Measures

KEPT_WIDTHS, BFLOAT16_BYTES = 8, 2
"""Vectors of the model's width kept for each token and step beside the MLP's own: input, norm, prediction, target, gradients."""


class LatentDynamics(nn.Module):
    """One step: (states [n, d], embeddings of the next tokens [n, d]) -> next states [n, d]."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm = nn.LayerNorm(2 * width)
        self.body = nn.Sequential(
            nn.Linear(2 * width, inner), nn.GELU(), nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, width)
        )

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        return states + self.body(self.norm(torch.cat([states, embeddings], dim=-1)))


class NextLatentPrediction(Objective):
    """The dynamics model and its loss."""

    name: ClassVar[str] = "nextlat"
    Options: ClassVar[type[NextLatentOptions]] = NextLatentOptions

    def __init__(self, setup: Setup):
        super().__init__(setup)
        assert isinstance(setup.options, NextLatentOptions)
        self.options = setup.options
        width = setup.lm.config.hidden_size
        self.inner = self.options.hidden_dim or width
        with torch.device("meta"):
            self.dynamics = LatentDynamics(width, self.inner)

    def find_future_pass(self) -> None:
        """None: the causal pass is all that is read."""

    @property
    def fits_graph(self) -> bool:
        return True

    def loss(
        self, backbone: TrainingModel, hidden_states: Tensor, batch: PackedBatch, prepared: None, *, with_sample: bool = False
    ) -> AuxLoss:
        positions, head = list_predicted(batch), backbone.output_head
        frozen_bias = None if head.bias is None else head.bias.detach()
        labels, documents, last = batch.labels[0], batch.segment_ids[0], len(hidden_states) - 1
        here = torch.arange(last + 1, device=labels.device) if positions is None else positions
        embeddings, all_targets = guard_gradient(backbone.embed_tokens(batch)), hidden_states.detach()
        states = first = pick(hidden_states, positions)
        wide = torch.promote_types(states.dtype, torch.float32)
        regression, divergence, agreed, compared = torch.zeros(4, dtype=wide, device=states.device).unbind()
        sample = None
        for step in range(1, self.options.horizon + 1):
            before, there = (here + step - 1).clamp(max=last), (here + step).clamp(max=last)
            is_counted = (labels[here] != NO_LABEL) & (labels[before] != NO_LABEL) & (documents[here] == documents[before])
            states, targets = self.dynamics(states, embeddings[there]), all_targets[there]
            errors = F.smooth_l1_loss(states.to(wide), targets.to(wide), reduction="none").mean(dim=-1)
            regression = regression + torch.where(is_counted, errors, 0.0).sum()
            compared = compared + is_counted.sum()
            if self.options.kl_weight:
                found = linear_divergence(
                    states, head.weight.detach(), targets, is_counted, bias=frozen_bias, scale=head.rule.scale, cap=head.rule.cap
                )
                divergence, agreed = divergence + found.total, agreed + found.agreed
            if with_sample and step == 1:
                sample = ProbeSample(first.detach(), states.detach(), targets, here, is_counted)
        loss_sum = (regression + self.options.kl_weight * divergence) / self.options.horizon
        count = batch.sum_labels().to(loss_sum.dtype)
        measures: Measures = {"nextlat_smooth_l1": Mean(regression.detach() / self.options.horizon, count)}
        if self.options.kl_weight:
            measures["nextlat_kl"] = Mean(divergence.detach() / self.options.horizon, count)
            measures["nextlat_agreement"] = Mean(agreed, compared)
        return AuxLoss(loss_sum, count, torch.zeros_like(count), measures, sample)

    def list_compiled(self) -> list[nn.Module]:
        return [self.dynamics]

    def count_flops(self, batch: PackedBatch, model: ModelFlops) -> AuxFlops:
        """The dynamics model forward and backward; logits of both states, and the gradient of the predicted one."""
        weights = count_matrix_weights(self.dynamics) + (model.head if self.options.kl_weight else 0)
        return AuxFlops(heads=6.0 * weights * self.options.horizon * count_predicted(batch))

    def estimate_memory(self, tokens: int) -> float:
        kept = KEPT_WIDTHS * self.setup.lm.config.hidden_size + 4 * self.inner
        return float(self.options.horizon * tokens * kept * BFLOAT16_BYTES)

    def measure_sample(self, sample: ProbeSample, batch: PackedBatch, seed: int) -> dict[str, Mean]:
        return measure_representations(sample, batch, target_shift=1, seed=seed)
