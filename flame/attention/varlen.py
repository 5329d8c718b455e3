"""Softmax attention inside the documents of a packed batch, by a variable-length flash kernel on GPUs in half precision.

The kernels only do causal attention. The anti-causal pass reads the packed sequence backwards, which turns "strictly later" into
"strictly earlier". Shifting by one token makes causal attention strict: `query[1:]` attends to `key[:-1]`. Then the first token
of each document has no key, or one of the document before. Its output is set to zero, as for any query without keys.

Shape legend: T tokens, H query heads, K key heads (H a multiple of K), D head width, S documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from flame.attention import flash as flash_kernels
from flame.attention.families import tighten

IMPLEMENTATION = "flame_varlen"
"""Name under which `attend` is registered with transformers."""
WIDEST_HEAD = 256
UNSUPPORTED = ("dropout", "softcap", "s_aux", "sinks", "position_bias")
"""Arguments that models may pass to their attention, and that the flash kernels here do not support."""


class DocumentLayout(NamedTuple):
    """Which keys a query attends to in one pass over a packed batch. Passed through a model's forward as `documents`."""

    cu_seqlens: Tensor
    """int32 [S+1]"""
    max_length: int
    """Upper bound of the document lengths. The same for all batches of a run, since it is a constant in compiled graphs."""
    is_strict: bool
    """Whether a token is not allowed to attend to itself."""
    window_k: int = 0
    """Largest distance of a key, in tokens; 0 means no window."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    documents: DocumentLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **further: object,
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D].

    A token attends to earlier tokens of its document and, unless `documents.is_strict`, to itself. `sliding_window` is that of
    the layer, in tokens, including the query's own.

    Raises:
        NotImplementedError: the model passes an argument that the kernels do not support.
    """
    for name in UNSUPPORTED:
        asked = further.get(name)
        if isinstance(asked, Tensor) or asked:
            raise NotImplementedError(f"{type(module).__name__} asks for {name}, which the flash kernels here do not do")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # autocast skips custom kernels; rotary embeddings return float32
        query, key, value = (states.to(torch.get_autocast_dtype(query.device.type)) for states in (query, key, value))
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    cu_seqlens, max_length, is_strict, window_k = documents
    limit = tighten(window_k, (sliding_window or 1) - 1)
    if not is_strict:
        return varlen_attention(q, k, v, cu_seqlens, max_length, limit or -1, scale)[0][None], None
    cut = cu_seqlens.clamp(max=len(q) - 1)
    shifted = varlen_attention(q[1:], k[:-1], v[:-1], cut, max_length, limit - 1, scale)[0]
    out = torch.cat([shifted.new_zeros(1, *shifted.shape[1:]), shifted])
    return out.index_fill(0, cu_seqlens[:-1].long(), 0.0)[None], None


AttentionInterface.register(IMPLEMENTATION, attend)


@torch.library.custom_op("flame::varlen_attention", mutates_args=())
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each document.

    Args:
        query: [T, H, D], float16 or bfloat16. key, value: [T, K, D].
        cu_seqlens: int32 [S+1]. Documents may be empty.
        max_length: upper bound of the document lengths.
        window: largest distance of a key, in tokens; -1 means no window.
        scale: of the scores.

    Returns:
        output [T, H, D] and the logarithms of the softmax denominators [H, T], float32.
    """
    return flash_kernels.run_forward(query, key, value, cu_seqlens, max_length, window, scale)


@varlen_attention.register_kernel("cpu")
def _define(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The reference on CPUs, for tests: computes all T^2 scores."""
    scores = _score_all(query, key, cu_seqlens, window, scale)
    lse = scores.logsumexp(dim=-1)
    out = torch.einsum("hqk,khd->qhd", torch.exp(scores - lse[:, :, None]), _repeat(value, query).to(scores.dtype))
    return out.to(query.dtype).contiguous(), lse.float()


def _score_all(query: Tensor, key: Tensor, cu_seqlens: Tensor, window: int, scale: float) -> Tensor:
    """[H, T, T] in float32 or wider, -inf where attention is not allowed."""
    wide = torch.promote_types(query.dtype, torch.float32)
    index = torch.arange(len(query))
    document = torch.bucketize(index, cu_seqlens[1:-1], right=True)
    back = index[:, None] - index[None, :]
    allowed = (document[:, None] == document[None, :]) & (back >= 0) & ((back <= window) | (window < 0))
    scores = torch.einsum("qhd,khd->hqk", query.to(wide), _repeat(key, query).to(wide)) * scale
    return scores.masked_fill(~allowed, -torch.inf)


def _repeat(states: Tensor, query: Tensor) -> Tensor:
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)


@varlen_attention.register_fake
def _(query, key, value, cu_seqlens, max_length, window, scale):
    total, heads, _ = query.shape
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(heads, total, dtype=torch.float32)


@torch.library.custom_op("flame::varlen_attention_backward", mutates_args=())
def _varlen_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_length: int, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return flash_kernels.run_backward(grad_out, query, key, value, out, lse, cu_seqlens, max_length, window, scale)


@_varlen_attention_backward.register_kernel("cpu")
def _(grad_out, query, key, value, out, lse, cu_seqlens, max_length, window, scale):
    scores = _score_all(query, key, cu_seqlens, window, scale)
    wide, groups = scores.dtype, (len(key), key.shape[1], -1, key.shape[2])
    probs = torch.softmax(scores, dim=-1)
    grad_out = grad_out.to(wide)
    grad_probs = torch.einsum("qhd,khd->hqk", grad_out, _repeat(value, query).to(wide))
    grad_scores = probs * (grad_probs - (grad_probs * probs).sum(dim=-1, keepdim=True)) * scale
    grad_query = torch.einsum("hqk,khd->qhd", grad_scores, _repeat(key, query).to(wide))
    grad_key = torch.einsum("hqk,qhd->khd", grad_scores, query.to(wide)).reshape(groups).sum(dim=2)
    grad_value = torch.einsum("hqk,qhd->khd", probs, grad_out).reshape(groups).sum(dim=2)
    grads = (grad_query, query), (grad_key, key), (grad_value, value)
    return tuple(grad.to(states.dtype).contiguous() for grad, states in grads)


@_varlen_attention_backward.register_fake
def _(grad_out, query, key, value, out, lse, cu_seqlens, max_length, window, scale):
    return tuple(torch.empty_like(states, memory_format=torch.contiguous_format) for states in (query, key, value))


def _save_for_backward(ctx, inputs, output) -> None:
    query, key, value, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)


def _backward(ctx, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *states, cu_seqlens = ctx.saved_tensors
    return *_varlen_attention_backward(grad_out, *states, cu_seqlens, *ctx.settings), None, None, None, None


varlen_attention.register_autograd(_backward, setup_context=_save_for_backward)
