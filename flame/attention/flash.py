"""Chooses the flash kernel for `flame.attention.varlen` on this GPU: FlashAttention-4 if installed, else PyTorch's own.

FlashAttention-4 is faster; `python -m benchmarks.kernels` measures both. `pip install -r requirements-hopper.txt` installs it.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import warnings
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger("flame")

FA4_GENERATIONS = (9, 10)
"""Major compute capabilities that FlashAttention-4 supports: Hopper and Blackwell."""
FA4_SHARED_ARGUMENTS = {
    *("softmax_scale", "causal", "window_size_left", "window_size_right"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
}
FA4_WIDEST_ON_BLACKWELL = 128
FIRST_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs that PyTorch's flash kernels run on."""


def is_supported() -> bool:
    """Whether this GPU has a flash kernel at all."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= FIRST_CAPABILITY


@functools.cache
def find_fa4(head_dim: int) -> ModuleType | None:
    """FlashAttention-4's interface, or None if it is not installed or does not support this GPU or head width.

    Warns if it is installed but cannot be used.
    """
    generation = torch.cuda.get_device_capability()[0]
    if generation == 10 and head_dim > FA4_WIDEST_ON_BLACKWELL:
        return None
    return _import_fa4()


@functools.cache
def _import_fa4() -> ModuleType | None:
    if torch.cuda.get_device_capability()[0] not in FA4_GENERATIONS or not importlib.util.find_spec("flash_attn"):
        return None
    try:
        interface = importlib.import_module("flash_attn.cute.interface")
    except Exception as error:  # compiled for another CUDA or Python, or FlashAttention-2, which has no such module
        # A log record that keeps the exception keeps its frames, and with them the step that has asked.
        logger.warning("flash_attn is installed, but FlashAttention-4 cannot be imported (%s): not used", str(error))
        return None
    for function, own in ((interface._flash_attn_fwd, "return_lse"), (interface._flash_attn_bwd, "deterministic")):
        if missing := (FA4_SHARED_ARGUMENTS | {own}) - set(inspect.signature(function).parameters):
            logger.warning("this version of FlashAttention-4 has no argument %s: not used", ", ".join(sorted(missing)))
            return None
    warnings.filterwarnings("ignore", message="Argument aux_data")  # from FlashAttention-4's compiler
    return interface


def describe(head_dim: int) -> str:
    """Name of the kernel that will run on heads of this width."""
    return "FlashAttention-4" if find_fa4(head_dim) is not None else "PyTorch's flash attention"


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `flame.attention.varlen.varlen_attention`."""
    if (fa4 := find_fa4(query.shape[-1])) is not None:
        out, lse, *_ = fa4._flash_attn_fwd(
            query, key, value, return_lse=True, **_name_arguments(cu_seqlens, max_length, window, scale)
        )
        return out, lse
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, True, False,
        scale=scale, window_size_left=window, window_size_right=0,
    )  # fmt: skip
    return out, lse


def run_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_length: int, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients with respect to query, key and value."""
    grad_out = grad_out.contiguous()
    if (fa4 := find_fa4(query.shape[-1])) is not None:
        deterministic = torch.are_deterministic_algorithms_enabled()
        settings = _name_arguments(cu_seqlens, max_length, window, scale)
        return fa4._flash_attn_bwd(query, key, value, out, grad_out, lse, deterministic=deterministic, **settings)[:3]
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        grad_out, query, key, value, out, lse, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, True,
        *no_dropout, scale=scale, window_size_left=window, window_size_right=0,
    )  # fmt: skip


def _name_arguments(cu_seqlens: Tensor, max_length: int, window: int, scale: float) -> dict[str, object]:
    """The arguments that forward and backward share, under FlashAttention-4's names."""
    return {
        "softmax_scale": scale,
        "causal": True,
        "window_size_left": None if window < 0 else window,
        "window_size_right": None if window < 0 else 0,
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max_length,
        "max_seqlen_k": max_length,
    }
