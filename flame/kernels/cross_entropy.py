"""Next-token cross entropy, computed from hidden states without storing all logits.

The logits of a packed sequence (T x V) are computed chunk by chunk. Like in InfoNCE, the forward also computes the gradients.
So forward and backward together take three matrix products (6 T d V FLOPs) and one pass of `softmax_rows_` over the logits.
Shape legend: T tokens, d width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.softmax_rows import count_chunk_rows, softmax_rows_

IGNORED_LABEL = -100


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = count_chunk_rows(len(hidden_states), len(weight), hidden_states.dtype)
        wide = torch.promote_types(weight.dtype, torch.float32)
        one = torch.ones((), dtype=wide, device=weight.device)
        grad_hidden = torch.empty_like(hidden_states)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        logits_buffer = hidden_states.new_empty(rows, len(weight))
        losses = []
        for start in range(0, len(hidden_states), rows):
            chunk = slice(start, start + rows)
            logits = torch.mm(hidden_states[chunk], weight.t(), out=logits_buffer[: len(hidden_states[chunk])])
            losses.append(softmax_rows_(logits, labels[chunk], one).loss.sum())
            torch.mm(logits, weight, out=grad_hidden[chunk])
            _add_product_(grad_weight, logits.t(), hidden_states[chunk])
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return torch.stack(losses).sum() if losses else one * 0.0

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight * grad_loss.to(grad_weight.dtype), None


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. `total` may have a wider dtype than a and b; on CUDA the product is then not rounded to theirs."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def linear_cross_entropy(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over positions of the cross entropy between softmax(hidden_states @ weight.T) and labels, in nats.

    Args:
        hidden_states: [T, d].
        weight: [V, d], the output embedding.
        labels: int64 [T]; positions with `IGNORED_LABEL` (-100) do not count.

    Returns:
        0-d float32 (float64 for float64 inputs).
    """
    return _LinearCrossEntropySum.apply(hidden_states, weight, labels)
