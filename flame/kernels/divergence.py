"""Kullback-Leibler divergence between two distributions over the vocabulary, from hidden states, without storing all logits.

    D = sum_t sum_v p_tv (ln p_tv - ln q_tv),      p_t = softmax(z(target_t)),  q_t = softmax(z(state_t)),

with the logits z of `flame.kernels.cross_entropy`: z = s (W h + b), then c tanh(z / c). Targets carry no gradient: neither their
states, nor the head where it makes p. Like the cross entropy, D is computed chunk by chunk, and its gradient in the forward:
d D / d z(state_t) = q_t - p_t.

Shape legend: n rows, d width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flame.kernels.cross_entropy import IGNORED_LABEL, _add_product_
from flame.kernels.softmax_rows import count_chunk_rows

WIDE_COPIES = 12
"""Working memory for each logit, in half-precision numbers: two rows of logits, and their float32 derivatives."""


class Divergence(NamedTuple):
    """Sums over the rows that count: 0-d, float32 (float64 for float64 states)."""

    total: Tensor
    """D, with gradient."""
    target_ce: Tensor
    """Cross entropy of p with the labels, without gradient. 0 without labels."""
    agreed: Tensor
    """Rows in which p and q have the same most likely token."""


def _compute_logits(states: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """[c, d] -> [c, V], float32 or wider. Products are rounded to the dtype of the states, as those of the cross entropy."""
    logits = states @ weight.t() if bias is None else torch.addmm(bias, states, weight.t())
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return wide if cap is None else cap * torch.tanh(wide / cap)


class _LinearDivergenceSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        is_counted: Tensor,
        labels: Tensor | None,
        scale: float,
        cap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(states.dtype, torch.float32)
        grad_states = torch.empty_like(states) if needs_states else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias and bias is not None else None
        total, target_ce, agreed = torch.zeros(3, dtype=wide, device=states.device).unbind()
        rows = count_chunk_rows(len(states), WIDE_COPIES * len(weight), states.dtype)
        for start in range(0, len(states), rows):
            chunk = slice(start, start + rows)
            counts = is_counted[chunk]
            logits = _compute_logits(states[chunk], weight, bias, scale, cap)
            wanted = _compute_logits(targets[chunk], weight, bias, scale, cap)
            agreed = agreed + (counts & (logits.argmax(dim=-1) == wanted.argmax(dim=-1))).sum()
            wanted, predicted = wanted.log_softmax(dim=-1), logits.log_softmax(dim=-1)
            probabilities = wanted.exp()
            total = total + torch.where(counts, (probabilities * (wanted - predicted)).sum(dim=-1), 0.0).sum()
            if labels is not None:
                own, is_labelled = labels[chunk], labels[chunk] != IGNORED_LABEL
                own_scores = wanted.gather(1, own.clamp(min=0)[:, None])[:, 0]
                target_ce = target_ce - torch.where(is_labelled, own_scores, 0.0).sum()
            if not (needs_states or needs_weight or needs_bias):
                continue
            grad = torch.where(counts[:, None], predicted.exp_().sub_(probabilities), 0.0)
            if cap is not None:
                grad = grad * (1 - (logits / cap) ** 2)
            grad = (grad * scale).to(states.dtype)
            if grad_states is not None:
                torch.mm(grad, weight, out=grad_states[chunk])
            if grad_weight is not None:
                _add_product_(grad_weight, grad.t(), states[chunk])
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0, dtype=wide)
        ctx.save_for_backward(
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(target_ce, agreed)
        return total, target_ce, agreed

    @staticmethod
    def backward(ctx, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if each is None else each * grad_total.to(each.dtype) for each in ctx.saved_tensors)
        return (*gradients, None, None, None, None, None)


def linear_divergence(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    is_counted: Tensor,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> Divergence:
    """D, summed over the rows that count. Does not wait for the device.

    Args:
        states: [n, d], whose distribution q is trained.
        weight: [V, d], the output embedding. Its gradient is that through q; detach it to train the states alone.
        targets: [n, d], whose distribution is p.
        is_counted: bool [n].
        labels: int64 [n], for `Divergence.target_ce`; -100 does not count.
        bias, scale, cap: as in `flame.kernels.cross_entropy.linear_cross_entropy`.
    """
    return Divergence(*_LinearDivergenceSum.apply(states, weight, bias, targets.detach(), is_counted, labels, scale, cap))
