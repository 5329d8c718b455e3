"""The two passes of one network over a packed batch: hidden states from the past, summaries of the future.

`VarlenPasses`: softmax attention in half precision on GPUs. Flash kernels that skip whole documents; the anti-causal pass reads
the pack backwards, under strictly causal attention.
`MaskedPasses`: softmax attention elsewhere. The anti-causal pass is the same forward under an anti-causal mask.
`ReversedPasses`: recurrent layers (linear attention, state-space models) take neither. Each document is reversed, run forward,
and reversed back. There a summary holds its own token by construction.

In every case summary t depends on tokens t .. end of its document, and on nothing else.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.data.batch import PackedBatch
from flame.models import flash_kernels
from flame.models.attention_mask import AttentionMask, Direction, build_block_mask, build_boolean_mask
from flame.models.families import find_family, find_limits, tighten
from flame.models.fla_families import TAKES_ROWS
from flame.models.varlen_attention import WIDEST_HEAD, DocumentLayout


class Passes(Protocol):
    """How a family of models reads a packed batch of T tokens in either direction; no logits are computed."""

    def encode_past(self, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
        """Final hidden states [T, d] of the causal forward."""
        ...

    def encode_future(self, model: PreTrainedModel, batch: PackedBatch, window_k: int) -> Tensor:
        """Final hidden states [T, d] of the anti-causal forward; window_k is `future_encoder.future_k`."""
        ...

    def describe(self) -> str:
        """What attends, for the log."""
        ...


class VarlenPasses:
    """Softmax attention by `flame.models.varlen_attention`.

    Args:
        max_length: no document of any batch is longer.
        head_dim: width of the heads.
    """

    def __init__(self, max_length: int, head_dim: int):
        self._max_length = max_length
        self._head_dim = head_dim

    def encode_past(self, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
        layout = self._lay_out(batch.cu_seqlens, is_strict=False, window_k=0)
        return self._run(model, batch.input_ids, batch.position_ids, layout)

    def encode_future(self, model: PreTrainedModel, batch: PackedBatch, window_k: int) -> Tensor:
        backwards = batch.input_ids.shape[1] - batch.cu_seqlens.flip(0)
        if len(backwards) == 2:  # a graph made for one document would hold for no other number: let an empty one go before
            backwards = F.pad(backwards, (1, 0))
        layout = self._lay_out(backwards, is_strict=True, window_k=window_k)
        return self._run(model, batch.input_ids.flip(1), batch.position_ids.flip(1), layout).flip(0)

    def describe(self) -> str:
        return flash_kernels.describe(self._head_dim)

    def _lay_out(self, cu_seqlens: Tensor, is_strict: bool, window_k: int) -> DocumentLayout:
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # the number of documents changes from batch to batch
        return DocumentLayout(cu_seqlens, self._max_length, is_strict, window_k)

    def _run(self, model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: DocumentLayout) -> Tensor:
        outputs = model.base_model(input_ids=input_ids, position_ids=position_ids, documents=layout, use_cache=False)
        return outputs.last_hidden_state[0]


class MaskedPasses:
    """Softmax attention: FlexAttention or SDPA under our masks.

    Args:
        by_blocks: FlexAttention attends, and takes BlockMasks.
        limits: of the layers' own windows, as `find_limits` gives them.
    """

    def __init__(self, by_blocks: bool, limits: int | dict[str, int]):
        self._by_blocks = by_blocks
        self._limits = limits

    def describe(self) -> str:
        return "FlexAttention" if self._by_blocks else "PyTorch's SDPA"

    def encode_past(self, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
        return self._run(model, batch, "causal", window_k=0)

    def encode_future(self, model: PreTrainedModel, batch: PackedBatch, window_k: int) -> Tensor:
        return self._run(model, batch, "future", window_k)

    def _run(self, model: PreTrainedModel, batch: PackedBatch, direction: Direction, window_k: int) -> Tensor:
        masks = self._build_masks(batch.segment_ids[0], direction, window_k)
        outputs = model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=masks, use_cache=False
        )
        return outputs.last_hidden_state[0]

    def _build_masks(self, segment_ids: Tensor, direction: Direction, window_k: int) -> AttentionMask | dict[str, AttentionMask]:
        def build(limit: int) -> AttentionMask:
            build_mask = build_block_mask if self._by_blocks else build_boolean_mask
            return build_mask(segment_ids, direction, tighten(limit, window_k))

        if isinstance(self._limits, dict):
            return {kind: build(limit) for kind, limit in self._limits.items()}
        return build(self._limits)


class ReversedPasses:
    """Recurrent layers of flash-linear-attention, which reset their state at `cu_seqlens`, or read a row for each document."""

    def describe(self) -> str:
        return "flash-linear-attention"

    def encode_past(self, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
        return self._run(model, batch.input_ids, batch.cu_seqlens)

    def encode_future(self, model: PreTrainedModel, batch: PackedBatch, window_k: int) -> Tensor:
        assert not window_k, "a recurrence has no window"
        order = reverse_documents(batch.cu_seqlens, batch.input_ids.shape[1])
        return self._run(model, batch.input_ids[:, order], batch.cu_seqlens)[order]

    def _run(self, model: PreTrainedModel, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        if model.config.model_type in TAKES_ROWS:
            return self._run_rows(model, input_ids, cu_seqlens)
        return model.base_model(input_ids=input_ids, cu_seqlens=cu_seqlens, use_cache=False).last_hidden_state[0]

    def _run_rows(self, model: PreTrainedModel, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """One document a row, padded on the right, where nothing reads it, to the longest: S x longest tokens instead of T."""
        cu = cu_seqlens.long()
        lengths, total = cu[1:] - cu[:-1], input_ids.shape[1]
        longest = int(lengths.max())
        row_starts = torch.arange(len(lengths), device=cu.device) * longest
        places = torch.repeat_interleave(row_starts - cu[:-1], lengths, output_size=total) + torch.arange(total, device=cu.device)
        rows = input_ids.new_zeros(len(lengths) * longest).index_copy(0, places, input_ids[0]).view(-1, longest)
        return model.base_model(input_ids=rows, use_cache=False).last_hidden_state.flatten(0, 1)[places]


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


Attention = Literal["varlen", "flex", "sdpa", "none"]


def choose_attention(config: PretrainedConfig, device_type: str, dtype: torch.dtype) -> Attention:
    """How a family attends on a device, with activations of a dtype: "none" is flash-linear-attention's own layers.

    The flash kernels know half precision, plain softmax and heads of up to `WIDEST_HEAD`, and the model's code must hand on to
    them where documents begin; FlexAttention has none of these limits.
    """
    if is_recurrent(config):
        return "none"
    if device_type != "cuda":
        return "sdpa"
    head_dim, family = find_head_dim(config), find_family(config)
    fits = dtype == torch.bfloat16 and head_dim <= WIDEST_HEAD and head_dim % 8 == 0
    if family is not None and fits and flash_kernels.is_supported():
        return "varlen"
    return "flex" if family is None or family.takes_flex else "sdpa"


def find_head_dim(config: PretrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def build_passes(attention: Attention, config: PretrainedConfig, max_length: int) -> Passes:
    """The passes that go with a choice of `choose_attention`; no document is longer than max_length."""
    if attention == "varlen":
        return VarlenPasses(max_length, find_head_dim(config))
    if attention == "none":
        return ReversedPasses()
    return MaskedPasses(attention == "flex", find_limits(config))


def is_recurrent(config: PretrainedConfig) -> bool:
    """Whether the family is one of flash-linear-attention's, which take `cu_seqlens` instead of a mask."""
    return type(config).__module__.startswith("fla.")
