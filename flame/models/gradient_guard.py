"""Keeps what goes wrong on the future side of the loss away from the backbone."""

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
    """The same values; a gradient with any infinity or NaN in it becomes zero on the way back. Never waits for the device."""
    return _GradientGuard.apply(hidden_states)
