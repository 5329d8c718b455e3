"""Next-token cross entropy, computed from hidden states without storing all logits.

The logits of a packed sequence (T x V) are computed chunk by chunk. Like in InfoNCE, the forward also computes the gradients.
So forward and backward together take three matrix products (6 T d V FLOPs) and one pass of `softmax_rows_` over the logits. Two
of the products can be in 8 bits, by `flame.kernels.float8_head`. Without gradients, as in validation, one product is left.

With a bias b, a scale s and a cap c, as in some families, the logits are z = s (W h + b), then c tanh(z / c). As c tanh(s x / c)
is s times x capped at c / s, the row kernel caps at c / s and scales afterwards. The backward multiplies the gradients by s.

Shape legend: T tokens, d width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flame.kernels.float8_head import Float8Head
from flame.kernels.softmax_rows import count_chunk_rows, softmax_rows_

IGNORED_LABEL = -100


class _Gradients(NamedTuple):
    """Of the sum of losses with respect to z / s."""

    hidden_states: Tensor
    weight: Tensor
    """In float32 or wider, as that of the bias."""
    bias: Tensor | None


def _sum_losses(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    cap: float | None,
    in_float8: bool,
    gradients: _Gradients | None = None,
) -> Tensor:
    """The sum. If gradients are given, those of the states are written there, and the others added."""
    head = Float8Head(weight) if in_float8 else None
    rows = count_chunk_rows(len(hidden_states), len(weight), hidden_states.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    factor = torch.full((), scale, dtype=wide, device=weight.device)
    logits_buffer = hidden_states.new_empty(rows, len(weight))
    losses = []
    for start in range(0, len(hidden_states), rows):
        chunk = slice(start, start + rows)
        logits = logits_buffer[: len(hidden_states[chunk])]
        if head is not None:
            head.project_(hidden_states[chunk], logits)
            if bias is not None:
                logits += bias
        elif bias is None:
            torch.mm(hidden_states[chunk], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden_states[chunk], weight.t(), out=logits)
        losses.append(softmax_rows_(logits, labels[chunk], factor, cap=None if cap is None else cap / scale).loss.sum())
        if gradients is None:
            continue
        if head is not None:
            head.multiply_gradient_(logits, labels[chunk], gradients.hidden_states[chunk])
        else:
            torch.mm(logits, weight, out=gradients.hidden_states[chunk])
        _add_product_(gradients.weight, logits.t(), hidden_states[chunk])
        if gradients.bias is not None:
            gradients.bias.add_(logits.sum(dim=0, dtype=wide))
    return torch.stack(losses).sum() if losses else factor * 0.0


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_states: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None,
        scale: float, cap: float | None, in_float8: bool,
    ) -> Tensor:  # fmt: skip
        wide = torch.promote_types(weight.dtype, torch.float32)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        found = _Gradients(torch.empty_like(hidden_states), torch.zeros_like(weight, dtype=wide), of_bias)
        total = _sum_losses(hidden_states, weight, labels, bias, scale, cap, in_float8, found)
        ctx.scale = scale
        of_bias = of_bias if bias is None or of_bias is None else of_bias.to(bias.dtype)
        ctx.save_for_backward(found.hidden_states, found.weight.to(weight.dtype), of_bias)
        return total

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if ctx.scale != 1:
            grad_loss = grad_loss * ctx.scale
        grad_bias = None if grad_bias is None else grad_bias * grad_loss.to(grad_bias.dtype)
        return (
            grad_hidden * grad_loss.to(grad_hidden.dtype),
            grad_weight * grad_loss.to(grad_weight.dtype),
            None,
            grad_bias,
            None,
            None,
            None,
        )


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. `total` may have a wider dtype than a and b; on CUDA the product is then not rounded to theirs."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    in_float8: bool = False,
) -> Tensor:
    """Sum over positions of the cross entropy between softmax(z) and labels, in nats, with logits
    z = scale * (hidden_states @ weight.T + bias), and cap * tanh(z / cap) instead if there is a cap.

    Args:
        hidden_states: [T, d].
        weight: [V, d], the output embedding.
        labels: int64 [T]; positions with `IGNORED_LABEL` (-100) do not count.
        bias: [V]; None is 0.
        scale, cap: greater than 0; no cap is None.
        in_float8: round the factors of the logits and of the gradient of the states to 8 bits (`flame.kernels.float8_head`). On a
            GPU, d and V must be multiples of 16 then.

    Returns:
        0-d float32 (float64 for float64 inputs).
    """
    arguments = (hidden_states, weight, labels, bias, scale, cap, in_float8)
    needs_gradient = any(each is not None and each.requires_grad for each in (hidden_states, weight, bias))
    if torch.is_grad_enabled() and needs_gradient:
        return _LinearCrossEntropySum.apply(*arguments)
    return _sum_losses(*arguments)
