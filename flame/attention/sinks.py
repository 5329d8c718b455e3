"""Softmax attention with sinks, under boolean masks.

An attention sink is one more logit a head in the denominator of the softmax, learned (gpt-oss, arXiv:2508.10925). With scores
s_ij, query i attends to key j by exp(s_ij) / (exp(sink) + sum_k exp(s_ik)). A query without keys attends to the sink alone,
and so its output is zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IMPLEMENTATION = "flame_sinks"
"""Name under which `attend` is registered with transformers."""
ADDED = 8
"""Channels that carry the sink, all but one of them zero: kernels on GPUs take heads of a multiple of 8."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    s_aux: Tensor,
    scaling: float | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers, by PyTorch's SDPA.

    The sink is the score of one more key, with value zero. The key is 1 in a further channel, where the other keys are 0 and
    the queries of head h are sinks[h] / scaling.

    Args:
        query: [B, H, T, D]. key, value: [B, K, T, D], [B, K, T, V].
        attention_mask: bool [1 or B, 1, T, T], true where attention is allowed.
        s_aux: [H], the sinks.

    Returns:
        [B, T, H, V].

    Raises:
        NotImplementedError: there is no mask. The model was not run by one of the passes.
    """
    if attention_mask is None or attention_mask.dtype != torch.bool:
        raise NotImplementedError(f"{IMPLEMENTATION} runs under the boolean masks of flame.attention.kernel_masks alone")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    carried = F.pad((s_aux / scale).to(query.dtype)[:, None, None], (0, ADDED - 1))
    sink_key = F.pad(key.new_ones(1), (key.shape[-1], ADDED - 1))
    query = torch.cat([query, carried.expand(*query.shape[:-1], ADDED)], dim=-1)
    key = torch.cat([F.pad(key, (0, ADDED)), sink_key.expand(*key.shape[:2], 1, -1)], dim=2)
    value = F.pad(value, (0, 0, 0, 1))
    return sdpa_attention_forward(module, query, key, value, F.pad(attention_mask, (0, 1), value=True), scaling=scale, **further)


AttentionInterface.register(IMPLEMENTATION, attend)
