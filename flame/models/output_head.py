"""The output head: from final hidden states to logits, as a family's own forward computes them.

With the head's matrix W and bias b, a scale s and a cap c, the logits of states h are z = s (W h + b), then c tanh(z / c).
The configuration says s and c. `flame.models.head_check` compares the logits with the model's own when a run starts.

Shape legend: T tokens, n states with a label, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flame.kernels.cross_entropy import linear_cross_entropy
from flame.kernels.softmax_rows import count_chunk_rows, softmax_rows_

FACTOR, DIVISOR, CAP = "logit_scale", "logits_scaling", "final_logit_softcapping"
"""Keys of configurations that change logits: multiplied (Cohere), divided (Granite, MiniCPM3), capped (Gemma)."""
DIVISOR_MULTIPLIES = ("hyperclovax",)
"""Families that multiply by `DIVISOR`."""


class LogitRule(NamedTuple):
    """What a family does to the products of states and output head."""

    scale: float = 1.0
    cap: float | None = None
    """None is no cap."""


def find_logit_rule(config: PretrainedConfig) -> LogitRule:
    """Scale and cap of a model's logits."""
    scale = float(getattr(config, FACTOR, None) or 1.0)
    divisor = float(getattr(config, DIVISOR, None) or 1.0)
    scale = scale * divisor if config.model_type in DIVISOR_MULTIPLIES else scale / divisor
    return LogitRule(scale, getattr(config, CAP, None))


def find_impossible_rules(config: PretrainedConfig) -> Iterator[str]:
    """Yield a line for each scale or cap that no model can have."""
    for key in (FACTOR, DIVISOR, CAP):
        value = getattr(config, key, None)
        if value is not None and not value > 0:
            yield f"{key} = {value}: it must be greater than 0"


class LabelScores(NamedTuple):
    """Of n labels, [n] each, float32 or wider."""

    loss: Tensor
    """Cross entropy in nats."""
    is_best: Tensor
    """1 where no other token has as high a logit, else 0."""


class OutputHead(NamedTuple):
    """The head's parameters and rule. Under FSDP the parameters are whole only inside the root's forward."""

    weight: Tensor
    """[V, d]"""
    bias: Tensor | None = None
    """[V]"""
    rule: LogitRule = LogitRule()
    trains_in_float8: bool = False
    """Whether cross entropies with a gradient take their products in 8 bits (`training.float8_head`)."""

    def sum_cross_entropy(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross entropies of states [T, d] with labels int64 [T] (-100 does not count): 0-d float32 or wider."""
        in_float8 = self.trains_in_float8 and torch.is_grad_enabled()  # validation measures the head as it is exported
        return linear_cross_entropy(hidden_states, self.weight, labels, self.bias, *self.rule, in_float8)

    @torch.no_grad()
    def score_labels(self, hidden_states: Tensor, labels: Tensor) -> LabelScores:
        """Cross entropy of each state [n, d] with its label, int64 [n]. Logits are computed chunk by chunk. They are not
        rounded to the dtype of the states: in half precision, too many of them would be equal."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        size = count_chunk_rows(len(hidden_states), len(self.weight), wide)
        scale = torch.full((), self.rule.scale, dtype=wide, device=self.weight.device)
        cap = None if self.rule.cap is None else self.rule.cap / self.rule.scale  # as in `linear_cross_entropy`
        chunks = [
            softmax_rows_(self._project_wide(states, wide), own, scale, cap=cap)
            for states, own in zip(hidden_states.split(size), labels.split(size), strict=True)
        ]
        return LabelScores(torch.cat([chunk.loss for chunk in chunks]), torch.cat([chunk.is_best for chunk in chunks]))

    def _project_wide(self, hidden_states: Tensor, wide: torch.dtype) -> Tensor:
        """The head's product [n, V] in a dtype that is not narrower than that of states and weights."""
        if hidden_states.dtype == wide:
            return F.linear(hidden_states, self.weight, self.bias)
        if hidden_states.is_cuda and len(hidden_states):  # none where a rank has no prompt left to complete
            product = torch.mm(hidden_states, self.weight.t(), out_dtype=wide)
        else:
            product = hidden_states.to(wide) @ self.weight.t().to(wide)
        return product if self.bias is None else product + self.bias

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[T, d] -> [T, V], in the dtype of the states."""
        return self._apply_rule(F.linear(hidden_states, self.weight, self.bias))

    def compute_wide_logits(self, hidden_states: Tensor) -> Tensor:
        """[n, d] -> [n, V], not rounded to the dtype of the states: the highest is the label that `score_labels` finds best."""
        return self._apply_rule(self._project_wide(hidden_states, torch.promote_types(self.weight.dtype, torch.float32)))

    def _apply_rule(self, products: Tensor) -> Tensor:
        logits = products * self.rule.scale
        return logits if self.rule.cap is None else self.rule.cap * torch.tanh(logits / self.rule.cap)


def read_head(lm: PreTrainedModel) -> OutputHead:
    """The output head of a language model."""
    head = lm.get_output_embeddings()
    return OutputHead(head.weight, head.bias, find_logit_rule(lm.config))


def find_head_fault(lm: PreTrainedModel) -> str:
    """Why logits cannot be computed from the output head; empty if they can."""
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return "its output head is not one nn.Linear"
    if head.in_features != lm.config.hidden_size:
        return (
            f"its output head has the width {head.in_features} beside hidden_size = {lm.config.hidden_size}: they must be equal"
        )
    known = {id(parameter) for part in (lm.base_model, head) for parameter in part.parameters()}
    beside = [name for name, parameter in lm.named_parameters() if id(parameter) not in known]
    if beside:
        return f"it has parameters beside its base model and its output head, which the loss would leave out ({beside[0]})"
    return ""
