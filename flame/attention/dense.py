"""Softmax attention with capped scores, under a boolean mask, in plain PyTorch. SDPA has no cap.

For CPUs, and for heads that are too narrow for FlexAttention. It holds all T^2 scores.
Shape legend: B rows, T tokens, H query heads, K key heads (H a multiple of K), D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

IMPLEMENTATION = "flame_dense"
"""Name under which `attend` is registered with transformers."""
UNSUPPORTED = ("s_aux", "sinks", "position_bias")
"""Arguments that models may pass to their attention, and that are not computed here."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **further: object,
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers: query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D].

    A score x becomes softcap * tanh(x / softcap) before it is masked. A query without keys gets exactly 0.

    Args:
        attention_mask: bool, broadcast to [B, H, T, T], true where attention is allowed.

    Raises:
        NotImplementedError: the model passes an argument that is not supported.
    """
    for name in UNSUPPORTED:
        asked = further.get(name)
        if isinstance(asked, Tensor) or asked:
            raise NotImplementedError(f"{type(module).__name__} asks for {name}, which the dense attention here does not do")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # The product with the mask makes rows without keys zero, which softmax makes uniform.
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    probs = F.dropout(torch.softmax(scores, dim=-1) * attention_mask, dropout)
    return torch.matmul(probs.to(value.dtype), value).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, attend)
