"""Next-token cross entropy straight from hidden states.

The logits of a whole pack (T x V) are never held: like InfoNCE, the gradients are formed in the forward, chunk by chunk.
Shape legend: T tokens, d width, V vocabulary, c rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED_LABEL = -100
ROWS_PER_CHUNK = 4096


def _cross_entropy_rows(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss sum (0-d) and its gradient by the logits [c, V] of a chunk: [c, d], [V, d], [c]."""
    logits = hidden_states @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = labels != IGNORED_LABEL
    own = torch.arange(weight.shape[0], device=labels.device)[None, :] == labels[:, None]
    lse = logits.logsumexp(dim=-1)
    loss = torch.where(counted, lse - torch.where(own, logits, 0.0).sum(dim=-1), 0.0).sum()
    grad = torch.where(counted[:, None], torch.exp(logits - lse[:, None]) - own.to(logits.dtype), 0.0)
    return loss, grad.to(hidden_states.dtype)


_cross_entropy_rows_compiled = torch.compile(_cross_entropy_rows, dynamic=False)


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        cross_entropy_rows = _cross_entropy_rows_compiled if hidden_states.is_cuda else _cross_entropy_rows
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden_states)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        losses = []
        chunks = (t.split(ROWS_PER_CHUNK) for t in (hidden_states, labels, grad_hidden))
        for hidden_chunk, label_chunk, grad_chunk in zip(*chunks, strict=True):
            loss, grad_logits = cross_entropy_rows(hidden_chunk, weight, label_chunk)
            torch.mm(grad_logits, weight, out=grad_chunk)
            grad_weight += grad_logits.t() @ hidden_chunk
            losses.append(loss)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight * grad_loss.to(grad_weight.dtype), None


def linear_cross_entropy(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over positions of the cross entropy between softmax(hidden_states @ weight.T) and labels, in nats.

    Args:
        hidden_states: [T, d]. weight: [V, d], the output embedding. labels: int64 [T]; `IGNORED_LABEL` (-100) is not counted.

    Returns:
        0-d float32 (float64 for float64 inputs).
    """
    return _LinearCrossEntropySum.apply(hidden_states, weight, labels)
