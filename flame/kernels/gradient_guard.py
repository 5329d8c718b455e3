"""Keeps infinities and NaNs in the gradient of the auxiliary loss away from the backbone."""

from __future__ import annotations

import torch
from torch import Tensor


class _GradientGuard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor) -> Tensor:
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.where(grad.isfinite().all(), grad, 0.0)


def guard_gradient(hidden_states: Tensor) -> Tensor:
    """Return the same values. In the backward, a gradient with any infinity or NaN becomes zero. Never waits for the device."""
    return _GradientGuard.apply(hidden_states)
