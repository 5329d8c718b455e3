"""The auxiliary loss of one packed sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from flame.runtime.measures import Measures


class AuxLoss(NamedTuple):
    """Sums over one packed sequence, which the trainer divides by counts of the whole step. 0-d tensors; only `loss_sum` has a
    gradient."""

    loss_sum: Tensor
    """float32 or wider, in nats. If nothing counts, exactly 0, with zero gradients."""
    num_items: Tensor
    """Number of items that `loss_sum` sums over."""
    failed: Tensor
    """1 if the loss or its gradient is infinite or NaN, else 0. If 1, all other sums and all gradients are exactly 0."""
    measures: Measures
    """Other measures to log, by name."""
    sample: Any = None
    """Input of the diagnostics, if requested."""
