"""The head that predicts the summary of a position's future from its causal hidden state."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class _GatedUnit(nn.Module):
    """SwiGLU: silu(gate(x)) * up(x) (Shazeer 2020, arXiv:2002.05202, section 2)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.gate = nn.Linear(hidden_size, hidden_size)
        self.up = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)


class FuturePredictorHead(nn.Module):
    """Map hidden states to unit vectors in the space of the summaries.

    Args:
        hidden_size: width d of hidden states and summaries.
        head_type: "linear" (norm, linear), "mlp" (norm, linear, GELU, linear) or "gated" (norm, SwiGLU, linear).
        dropout: probability, before the last linear layer.
        output_size: width of the predictions; 0 is hidden_size.

    Raises:
        ValueError: unknown head_type.
    """

    def __init__(
        self,
        hidden_size: int,
        head_type: Literal["linear", "mlp", "gated"] = "linear",
        dropout: float = 0.0,
        output_size: int = 0,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        if head_type == "linear":
            self.body: nn.Module = nn.Identity()
        elif head_type == "mlp":
            self.body = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU())
        elif head_type == "gated":
            self.body = _GatedUnit(hidden_size)
        else:
            raise ValueError(f'head_type = "{head_type}": allowed are "linear", "mlp" and "gated"')
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden_size, output_size or hidden_size)

    def init_weights(self) -> None:
        """Draw all weights; needed after building on the meta device."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [..., output_size], each vector of Euclidean norm 1."""
        prediction = self.out(self.dropout(self.body(self.norm(hidden_states))))
        return F.normalize(prediction, dim=-1)
