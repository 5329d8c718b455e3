"""Next-token cross entropy straight from hidden states.

The logits of a whole pack (T x V) are never held: like InfoNCE, the gradients are formed in the forward, chunk by chunk, so
that forward and backward are the three matrix products of 6 T d V FLOPs and one pass of `softmax_rows_` over the logits.
Shape legend: T tokens, d width, V vocabulary, c rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flame.models.softmax_rows import count_chunk_rows, softmax_rows_

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
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight * grad_loss.to(grad_weight.dtype), None


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be wider than a and b: on CUDA the product then is never rounded to their dtype."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def linear_cross_entropy(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over positions of the cross entropy between softmax(hidden_states @ weight.T) and labels, in nats.

    Args:
        hidden_states: [T, d]. weight: [V, d], the output embedding. labels: int64 [T]; `IGNORED_LABEL` (-100) is not counted.

    Returns:
        0-d float32 (float64 for float64 inputs).
    """
    return _LinearCrossEntropySum.apply(hidden_states, weight, labels)
