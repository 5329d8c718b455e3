"""The action loss of the method's first publication: rewards for candidates of the next token.

    A_t = the top_k tokens of p(. | h_t), and x_{t+1}
    s_t(a) = cos( head([h_t; e(a)]), F_{t+s} ) + label_bias [a = x_{t+1}]
    r_t = softmax over A_t of s_t / temperature,      without gradient
    L = mean over anchors of 1 / |A_t| sum_{a in A_t} - r_t(a) ln p(a | h_t)

It trains the language model, output head included. docs/objectives.md has its sources, and what they leave open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from flame.kernels.candidate_cross_entropy import TokenCandidates, linear_candidate_cross_entropy
from flame.kernels.softmax_rows import CHUNK_BYTES, count_chunk_rows
from flame.models.action_head import ActionHead, build_action_head
from flame.models.aux_loss import AuxLoss
from flame.models.estimator import at_least_float32
from flame.models.flops import ModelFlops
from flame.models.wrapper import TrainingModel
from flame.objectives.future.options import ActionOptions
from flame.objectives.future.representations import ProbeSample
from flame.runtime.measures import Mean, Measure, Measures

DIAGNOSTICS = ("action_label_in_top_k", "action_label_reward", "action_largest_reward", "action_score_spread")
HEAD_PRODUCTS, BFLOAT16_BYTES = 6, 2
"""FLOPs for each weight of the output head and anchor: two for logits, four backward."""


@dataclass
class Rewards:
    """Weighs the candidates of chunks of anchors, and sums `DIAGNOSTICS` over them."""

    options: ActionOptions
    head: ActionHead
    embed: Callable[[Tensor], Tensor]
    """int64 [...] tokens -> [..., embedding_size]"""
    states: Tensor
    """[n, d], detached."""
    targets: Tensor
    """[n, width], from `Estimator.encode_targets`."""
    is_counted: Tensor
    """bool [n]"""
    sums: list[Tensor] = field(default_factory=list)
    """[4] for each chunk."""

    def __call__(self, rows: slice, candidates: TokenCandidates) -> Tensor:
        """Rewards [c, k + 1], as `flame.kernels.candidate_cross_entropy.Weigh`."""
        states, targets = self.states[rows], self.targets[rows]
        size = count_chunk_rows(len(states), self.head.count_kept(self.options.top_k + 1), states.dtype)
        parts = zip(states.split(size), targets.split(size), candidates.tokens.split(size), strict=True)
        scores = torch.cat([self._score(*part) for part in parts])
        is_member, is_label = candidates.is_member, candidates.is_label
        biased = scores + self.options.label_bias * is_label
        rewards = torch.softmax((biased / self.options.temperature).masked_fill(~is_member, -torch.inf), dim=1)
        self.sums.append(self._measure(scores, rewards, is_member, is_label, self.is_counted[rows]))
        return rewards

    def _score(self, states: Tensor, targets: Tensor, tokens: Tensor) -> Tensor:
        """Cosines [c, k + 1] in float32 or wider."""
        outputs = self.head(states, self.embed(tokens).to(states.dtype))
        return F.cosine_similarity(outputs.to(at_least_float32(outputs)), targets[:, None], dim=-1)

    def _measure(self, scores: Tensor, rewards: Tensor, is_member: Tensor, is_label: Tensor, is_counted: Tensor) -> Tensor:
        size = is_member.sum(dim=1)
        scores = torch.where(is_member, scores, 0.0)
        mean = (scores.sum(dim=1) / size)[:, None]
        spread = (torch.where(is_member, scores - mean, 0.0).square().sum(dim=1) / size).sqrt()
        label_reward = torch.where(is_label, rewards, 0.0).sum(dim=1)
        in_top_k = (~is_member[:, -1]).to(scores.dtype)
        each = torch.stack([in_top_k, label_reward, rewards.amax(dim=1), spread])
        return torch.where(is_counted, each, 0.0).sum(dim=1)


class ActionLoss(nn.Module):
    """L and its head.

    Args:
        output_size: width of summaries as they are compared.
    """

    def __init__(self, options: ActionOptions, lm: PreTrainedModel, output_size: int):
        super().__init__()
        self.options = options
        self.head = build_action_head(lm, output_size)

    def init_weights(self) -> None:
        """Draw the head's weights, which stay so."""
        self.head.init_weights()

    def add_to(self, aux: AuxLoss, backbone: TrainingModel, states: Tensor, labels: Tensor, targets: Tensor) -> AuxLoss:
        """aux + loss_weight * L of n anchors, where L is not yet divided by their number.

        Args:
            states: [n, d], final states, with gradient.
            labels: int64 [n], the next tokens; -100 in rows that are no anchors.
            targets: [n, width], from `Estimator.encode_targets`: the summaries that the anchors predict.

        Returns:
            the sum, which measures as "action_loss" what was added. Its sample is `DIAGNOSTICS`, by name. If either loss is not
            finite, all sums and gradients are 0.
        """
        output_head, embed = backbone.output_head, backbone.lm.get_input_embeddings()
        rewards = Rewards(self.options, self.head, embed, states.detach(), targets, labels >= 0)
        found = linear_candidate_cross_entropy(
            states, output_head.weight, labels, self.options.top_k, rewards, output_head.bias, *output_head.rule
        )
        keep = torch.where(found.is_finite, 1.0 - aux.failed, 0.0)
        part = self.options.loss_weight * found.total
        measures: Measures = aux.measures | {"action_loss": Mean(part.detach(), aux.num_items)}
        kept: Measures = {name: _scale(each, keep) for name, each in measures.items()}
        count = torch.where(found.is_finite, rewards.is_counted.sum(), 0).to(part.dtype)
        sums = torch.where(found.is_finite, torch.stack(rewards.sums).sum(dim=0), 0.0)
        named = {name: Mean(each, count) for name, each in zip(DIAGNOSTICS, sums.unbind(), strict=True)}
        return AuxLoss((aux.loss_sum + part) * keep, aux.num_items * keep, 1.0 - keep, kept, named)

    def describe(self) -> str:
        """For the model card."""
        options = self.options
        shown = ("top_k", "temperature", "label_bias", "loss_weight")
        return "an action loss was added: " + ", ".join(f"{name} {getattr(options, name)}" for name in shown)

    def count_flops(self, model: ModelFlops, anchors: int) -> int:
        """FLOPs of so many anchors: three products with the output head, and a forward of the head for each candidate."""
        return anchors * (HEAD_PRODUCTS * model.head + self.head.count_flops(self.options.top_k + 1))

    def estimate_memory(self, lm: PreTrainedModel, anchors: int) -> float:
        """Bytes on a GPU: gradients of the output head and of the anchors' states, their states, and a chunk of work."""
        kept = lm.get_output_embeddings().weight.numel() + 2 * anchors * self.head.state_size
        work = min(CHUNK_BYTES, anchors * self.head.count_kept(self.options.top_k + 1) * BFLOAT16_BYTES)
        return kept * BFLOAT16_BYTES + work


class Sample(NamedTuple):
    """Input of the diagnostics of the future loss."""

    compared: ProbeSample
    action: dict[str, Mean]
    """`DIAGNOSTICS`, if there is an action loss."""


def _scale(measure: Measure, factor: Tensor) -> Mean:
    assert isinstance(measure, Mean)
    return Mean(measure.total * factor, measure.items * factor)
