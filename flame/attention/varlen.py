"""Softmax attention inside the documents of a packed batch, by a variable-length flash kernel on GPUs in half precision.

The kernels only do causal attention. The anti-causal pass reads the packed sequence backwards, which turns "strictly later" into
"strictly earlier". Shifting by one token makes causal attention strict: `query[1:]` attends to `key[:-1]`. Then the first token
of each document has no key, or one of the document before. Its output is set to zero, as for any query without keys.

Sinks (`flame.attention.sinks`) need nothing of the kernels but the logarithms of their denominators. The backward takes those
with the sinks, from which it has the right attention weights.

Shape legend: T tokens, H query heads, K key heads (H a multiple of K), D head width, S documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from flame.attention import flash as flash_kernels
from flame.attention.families import tighten

IMPLEMENTATION = "flame_varlen"
"""Name under which `attend` is registered with transformers."""
WIDEST_HEAD = 256
UNSUPPORTED = ("dropout", "softcap", "sinks", "position_bias")
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
    s_aux: Tensor | None = None,
    **further: object,
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers: query [1, H, T, D], key [1, K, T, D], value [1, K, T, V] -> [1, T, H, V].

    A token attends to earlier tokens of its document and, unless `documents.is_strict`, to itself. `sliding_window` is that of
    the layer, in tokens, including the query's own. `s_aux` [H] are the sinks. The kernels know one width: the narrower of D
    and V is padded with zeros.

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
    width = max(query.shape[-1], value.shape[-1])
    q, k, v = (_widen(states[0].transpose(0, 1), width) for states in (query, key, value))
    cu_seqlens, max_length, is_strict, window_k = documents
    limit = tighten(window_k, (sliding_window or 1) - 1)
    if not is_strict:
        out = varlen_attention(q, k, v, cu_seqlens, max_length, limit or -1, scale, s_aux)[0]
        return out[None, ..., : value.shape[-1]], None
    cut = cu_seqlens.clamp(max=len(q) - 1)
    shifted = varlen_attention(q[1:], k[:-1], v[:-1], cut, max_length, limit - 1, scale, s_aux)[0]
    out = torch.cat([shifted.new_zeros(1, *shifted.shape[1:]), shifted])
    starts = cu_seqlens[:-1].long() % len(q)  # that of an empty document at the end is no position: 0 is a start too
    return out.index_fill(0, starts, 0.0)[None, ..., : value.shape[-1]], None


def _widen(states: Tensor, width: int) -> Tensor:
    return F.pad(states, (0, width - states.shape[-1])) if states.shape[-1] < width else states


AttentionInterface.register(IMPLEMENTATION, attend)


@torch.library.custom_op("flame::varlen_attention", mutates_args=())
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    window: int,
    scale: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each document.

    Args:
        query: [T, H, D], float16 or bfloat16. key, value: [T, K, D].
        cu_seqlens: int32 [S+1]. Documents may be empty.
        max_length: upper bound of the document lengths.
        window: largest distance of a key, in tokens; -1 means no window.
        scale: of the scores.
        sinks: [H].

    Returns:
        output [T, H, D] and the logarithms of the softmax denominators [H, T], float32; float64 for float64.
    """
    return _launch(query, key, value, cu_seqlens, max_length, window, scale, sinks)


def _launch(query, key, value, cu_seqlens, max_length, window, scale, sinks=None) -> tuple[Tensor, Tensor]:
    out, lse = _add_sinks(*flash_kernels.run_forward(query, key, value, cu_seqlens, max_length, window, scale), sinks)
    return out.contiguous(), lse  # PyTorch's kernels answer in the layout of their inputs, which compiled code does not expect


def _add_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The results with one more term, exp(sink), in the denominators."""
    if sinks is None:
        return out, lse
    more = sinks.to(lse.dtype)[:, None]
    return (out * torch.sigmoid(lse - more).T[:, :, None]).to(out.dtype), torch.logaddexp(lse, more)


@varlen_attention.register_kernel("cpu")
def _define(query, key, value, cu_seqlens, max_length, window, scale, sinks=None):
    """The reference on CPUs, for tests: computes all T^2 scores."""
    scores = _score_all(query, key, cu_seqlens, window, scale)
    lse = scores.logsumexp(dim=-1)
    out = torch.einsum("hqk,khd->qhd", torch.exp(scores - lse[:, :, None]), _repeat(value, query).to(scores.dtype))
    return _add_sinks(out.to(query.dtype).contiguous(), lse, sinks)


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
def _(query, key, value, cu_seqlens, max_length, window, scale, sinks=None):
    total, heads, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(heads, total, dtype=wide)


@torch.library.custom_op("flame::varlen_attention_backward", mutates_args=())
def _varlen_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_length: int, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _launch_backward(grad_out, query, key, value, out, lse, cu_seqlens, max_length, window, scale)


def _launch_backward(
    grad_out, query, key, value, out, lse, cu_seqlens, max_length, window, scale
) -> tuple[Tensor, Tensor, Tensor]:
    grads = flash_kernels.run_backward(grad_out, query, key, value, out, lse, cu_seqlens, max_length, window, scale)
    grad_query, grad_key, grad_value = (grad.contiguous() for grad in grads)
    return grad_query, grad_key, grad_value


@_varlen_attention_backward.register_kernel("cpu")
def _(grad_out, query, key, value, out, lse, cu_seqlens, max_length, window, scale):
    """As the flash kernels do it: from the output and the denominators, which may have sinks."""
    scores = _score_all(query, key, cu_seqlens, window, scale)
    wide, groups = scores.dtype, (len(key), key.shape[1], -1, key.shape[2])
    probs = torch.exp(scores - lse[:, :, None])
    grad_out = grad_out.to(wide)
    grad_probs = torch.einsum("qhd,khd->hqk", grad_out, _repeat(value, query).to(wide))
    grad_scores = probs * (grad_probs - _sum_weighted(grad_out, out)[:, :, None]) * scale
    grad_query = torch.einsum("hqk,khd->qhd", grad_scores, _repeat(key, query).to(wide))
    grad_key = torch.einsum("hqk,qhd->khd", grad_scores, query.to(wide)).reshape(groups).sum(dim=2)
    grad_value = torch.einsum("hqk,qhd->khd", probs, grad_out).reshape(groups).sum(dim=2)
    grads = (grad_query, query), (grad_key, key), (grad_value, value)
    return tuple(grad.to(states.dtype).contiguous() for grad, states in grads)


@_varlen_attention_backward.register_fake
def _(grad_out, query, key, value, out, lse, cu_seqlens, max_length, window, scale):
    return tuple(torch.empty_like(states, memory_format=torch.contiguous_format) for states in (query, key, value))


def _sum_weighted(grad_out: Tensor, out: Tensor) -> Tensor:
    """[H, T]: the sum over keys of attention weight times its gradient. It is that of output times gradient, over channels."""
    wide = torch.promote_types(out.dtype, torch.float32)
    return (grad_out.to(wide) * out.to(wide)).sum(dim=-1).T


def _save_for_backward(ctx, inputs, output) -> None:
    query, key, value, cu_seqlens, *ctx.settings, sinks = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens, sinks)


def _backward(ctx, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *states, cu_seqlens, sinks = ctx.saved_tensors
    grads = _varlen_attention_backward(grad_out, *states, cu_seqlens, *ctx.settings)
    if sinks is None:
        return *grads, None, None, None, None, None
    out, lse = states[3:]
    weights = torch.exp(sinks.to(lse.dtype)[:, None] - lse)  # of the sink, whose value is zero
    return *grads, None, None, None, None, -(weights * _sum_weighted(grad_out, out)).sum(dim=-1).to(sinks.dtype)


varlen_attention.register_autograd(_backward, setup_context=_save_for_backward)
