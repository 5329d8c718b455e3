"""The two passes of one network over a packed batch: hidden states from the past, summaries of the future.

`MaskedPasses`: where attention takes a mask, the anti-causal pass is the same forward under an anti-causal mask.
`ReversedPasses`: where it cannot (linear attention, state-space models), each document is reversed, run forward, and reversed
back. There a summary holds its own token by construction.

Either way summary t depends on tokens t .. end of its document, and on nothing else.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.data.batch import PackedBatch
from flame.models.attention_mask import build_attention_mask


class Passes(Protocol):
    """How a family of models reads a packed batch of T tokens in either direction; no logits are computed."""

    def encode_past(self, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
        """Final hidden states [T, d] of the causal forward."""
        ...

    def encode_future(self, model: PreTrainedModel, batch: PackedBatch, window_k: int) -> Tensor:
        """Final hidden states [T, d] of the anti-causal forward; window_k is `future_encoder.future_k`."""
        ...


class MaskedPasses:
    """Softmax attention: FlexAttention or SDPA under our masks."""

    def encode_past(self, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
        return self._run(model, batch, build_attention_mask(batch.segment_ids[0], "causal"))

    def encode_future(self, model: PreTrainedModel, batch: PackedBatch, window_k: int) -> Tensor:
        return self._run(model, batch, build_attention_mask(batch.segment_ids[0], "future", window_k))

    def _run(self, model: PreTrainedModel, batch: PackedBatch, mask) -> Tensor:
        outputs = model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
        )
        return outputs.last_hidden_state[0]


class ReversedPasses:
    """Recurrent layers of flash-linear-attention, which reset their state at `cu_seqlens`."""

    def encode_past(self, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
        return self._run(model, batch.input_ids, batch.cu_seqlens)

    def encode_future(self, model: PreTrainedModel, batch: PackedBatch, window_k: int) -> Tensor:
        assert not window_k, "a recurrence has no window"
        order = reverse_documents(batch.cu_seqlens, batch.input_ids.shape[1])
        return self._run(model, batch.input_ids[:, order], batch.cu_seqlens)[order]

    def _run(self, model: PreTrainedModel, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        return model.base_model(input_ids=input_ids, cu_seqlens=cu_seqlens, use_cache=False).last_hidden_state[0]


def reverse_documents(cu_seqlens: Tensor, total: int) -> Tensor:
    """Index that reverses each document in place; it is its own inverse.

    Args:
        cu_seqlens: int32 [S+1].
        total: T, known without asking the device.

    Returns:
        int64 [T]: token t of a document [a, b) goes to a + b - 1 - t.
    """
    cu = cu_seqlens.long()
    starts_plus_ends = torch.repeat_interleave(cu[:-1] + cu[1:], cu[1:] - cu[:-1], output_size=total)
    return starts_plus_ends - 1 - torch.arange(total, device=cu.device)


def choose_passes(config: PretrainedConfig) -> Passes:
    """The passes of a family. All others than flash-linear-attention's must take a mask, which `build_on_meta` makes sure of."""
    return ReversedPasses() if is_recurrent(config) else MaskedPasses()


def is_recurrent(config: PretrainedConfig) -> bool:
    """Whether the family is one of flash-linear-attention's, which take `cu_seqlens` instead of a mask."""
    return type(config).__module__.startswith("fla.")
