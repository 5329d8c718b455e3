"""Cross entropy of weighted candidates for the next token, from hidden states, without storing all logits.

The candidates A of a position are the `top_k` tokens with the highest logits, and the label. Weights r, which sum to 1 over A and
carry no gradient, are chosen once the candidates are known. With the logits z of `flame.kernels.cross_entropy`,

    L = sum_t 1 / |A_t| sum_{a in A_t} - r_ta ln p_ta,      p_t = softmax(z_t),
    d L / d z_tv = (p_tv - r_tv) / |A_t|,                   r_tv = 0 outside A_t.

Like the cross entropy, L is computed chunk by chunk, and its gradient in the forward: three matrix products (6 T d V FLOPs) and
one pass of `softmax_rows_` over the logits. That pass leaves p in their place; only the columns of A are written again.

Shape legend: n rows, c rows of a chunk, d width, V vocabulary, k the top tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flame.kernels.cross_entropy import IGNORED_LABEL, _add_product_
from flame.kernels.softmax_rows import count_chunk_rows, softmax_rows_


class TokenCandidates(NamedTuple):
    """Candidates of a chunk of rows. A label that is among the top tokens stands in two columns, of which the first counts."""

    tokens: Tensor
    """int64 [c, k + 1], the top tokens from the highest logit down, then the label (any token in rows without one)."""
    is_member: Tensor
    """bool [c, k + 1]: which columns count."""
    is_label: Tensor
    """bool [c, k + 1]: which columns hold the label, counted or not."""


Weigh = Callable[[slice, TokenCandidates], Tensor]
"""(rows, their candidates) -> weights [c, k + 1], float32 or wider: 0 where a column does not count, else of sum 1."""


class CandidateLoss(NamedTuple):
    """Of all rows, 0-d."""

    total: Tensor
    """L, float32 (float64 for float64 states), with gradient; 0 if not finite."""
    is_finite: Tensor
    """bool: whether L and its gradients are finite. If not, its gradients are 0."""


class _CandidateCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        top_k: int,
        weigh: Weigh,
        scale: float,
        cap: float | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(states.dtype, torch.float32)
        factor = torch.full((), scale, dtype=wide, device=weight.device)
        inner_cap = None if cap is None else cap / scale  # the row kernel caps before it scales
        grad_states = torch.empty_like(states)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        rows = count_chunk_rows(len(states), len(weight), states.dtype)
        buffer = states.new_empty(min(rows, len(states)), len(weight))
        total = torch.zeros((), dtype=wide, device=states.device)
        for start in range(0, len(states), rows):
            chunk = slice(start, start + rows)
            inputs, own = states[chunk], torch.where(labels[chunk] == IGNORED_LABEL, -1, labels[chunk])
            logits = buffer[: len(inputs)]
            if bias is None:
                torch.mm(inputs, weight.t(), out=logits)
            else:
                torch.addmm(bias, inputs, weight.t(), out=logits)
            found = _find_candidates(logits, own, top_k)
            scores = logits.gather(1, found.tokens).to(wide)
            scores = scores if inner_cap is None else inner_cap * torch.tanh(scores / inner_cap)
            weights = weigh(chunk, found).to(wide)
            share = found.is_member.sum(dim=1, dtype=wide).reciprocal()

            sums = softmax_rows_(logits, own, factor, cap=inner_cap)
            log_total = sums.loss.to(wide) + scale * sums.own_score.to(wide)
            loss = log_total - (weights * scores).sum(dim=1) * scale
            total = total + torch.where(own >= 0, loss * share, 0.0).sum()

            label_weight = torch.where(found.is_label, weights, 0.0).sum(dim=1, keepdim=True)
            grad = torch.exp(scores * scale - log_total[:, None]) - torch.where(found.is_label, label_weight, weights)
            grad = grad if inner_cap is None else grad * (1 - (scores / inner_cap) ** 2)
            logits.scatter_(1, found.tokens, torch.where(own[:, None] >= 0, grad, 0.0).to(logits.dtype))
            torch.mm(logits, weight, out=grad_states[chunk])
            grad_states[chunk] *= share[:, None].to(states.dtype)
            _add_product_(grad_weight, logits.t(), (inputs * share[:, None]).to(states.dtype))
            if grad_bias is not None:
                grad_bias += logits.t() @ share.to(logits.dtype)
        is_finite = total.isfinite() & grad_states.isfinite().all() & grad_weight.isfinite().all()
        ctx.save_for_backward(is_finite, grad_states, grad_weight.to(weight.dtype), _narrow(grad_bias, bias))
        ctx.scale = scale
        ctx.mark_non_differentiable(is_finite)
        return torch.where(is_finite, total, 0.0), is_finite

    @staticmethod
    def backward(ctx, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        is_finite, *saved = ctx.saved_tensors
        factor = grad_total * ctx.scale
        found = (None if each is None else torch.where(is_finite, each * factor.to(each.dtype), 0.0) for each in saved)
        return (*found, None, None, None, None, None)


def _narrow(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _find_candidates(logits: Tensor, own: Tensor, top_k: int) -> TokenCandidates:
    """Candidates by logits [c, V] and labels int64 [c], negative in rows without one. Scale and cap keep the order of logits."""
    top, label = logits.topk(top_k, dim=1).indices, own.clamp(min=0)[:, None]
    tokens = torch.cat([top, label], dim=1)
    is_label = tokens == label
    is_member = torch.ones_like(is_label)
    is_member[:, -1] = ~is_label[:, :-1].any(dim=1)
    return TokenCandidates(tokens, is_member, is_label)


def linear_candidate_cross_entropy(
    states: Tensor,
    weight: Tensor,
    labels: Tensor,
    top_k: int,
    weigh: Weigh,
    bias: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> CandidateLoss:
    """L, summed over the rows with a label. Does not wait for the device.

    Args:
        states: [n, d].
        weight: [V, d], the output embedding.
        labels: int64 [n]; rows with `IGNORED_LABEL` (-100) do not count.
        top_k: k, from 1 to V.
        weigh: called once for each chunk of rows, in order.
        bias, scale, cap: as in `flame.kernels.cross_entropy.linear_cross_entropy`.
    """
    return CandidateLoss(*_CandidateCrossEntropySum.apply(states, weight, bias, labels, top_k, weigh, scale, cap))
