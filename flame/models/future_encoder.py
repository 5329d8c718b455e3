"""The two passes of one network over a packed batch: hidden states from the past, summaries of the future.

`VarlenPasses`: softmax attention in half precision on GPUs. Flash kernels that skip whole documents; the anti-causal pass reads
the pack backwards, under strictly causal attention.
`MaskedPasses`: softmax attention elsewhere. The anti-causal pass is the same forward under an anti-causal mask. On CPUs,
documents are a row each where padding costs less than attention across the pack.
`ReversedPasses`: recurrent layers (linear attention, state-space models) take neither. Each document is reversed, run forward,
and reversed back. There a summary holds its own token by construction.

In every case summary t depends on tokens t .. end of its document, and on nothing else.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.data.batch import PackedBatch
from flame.models import flash_kernels
from flame.models.attention_mask import AttentionMask, Direction, build_block_mask, build_boolean_mask, build_row_mask
from flame.models.families import find_family, find_limits, tighten
from flame.models.fla_families import TAKES_ROWS
from flame.models.varlen_attention import WIDEST_HEAD, DocumentLayout

KEYS_PER_WIDTH = 6
"""Times the width d of a model: the keys at which a token's attention takes as much arithmetic as its matrix products. A common
layer has 12 d^2 weights, and scores and sums of L keys are 2 d L products. Wide heads and experts change that by up to two."""
MOST_PLACES = 4
"""Places in rows, padding included, for each token of the pack: what a layer keeps for the backward grows with them."""


class Passes(Protocol):
    """How a family of models reads a packed batch of T tokens in either direction; no logits are computed."""

    def encode_past(self, model: PreTrainedModel, batch: PackedBatch, embeddings: Tensor | None = None) -> Tensor:
        """Final hidden states [T, d] of the causal forward, of the batch's tokens or of embeddings [T, d] in their places."""
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

    def encode_past(self, model: PreTrainedModel, batch: PackedBatch, embeddings: Tensor | None = None) -> Tensor:
        layout = self._lay_out(batch.cu_seqlens, is_strict=False, window_k=0)
        return self._run(model, _choose_inputs(batch.input_ids, embeddings), batch.position_ids, layout)

    def encode_future(self, model: PreTrainedModel, batch: PackedBatch, window_k: int) -> Tensor:
        backwards = batch.input_ids.shape[1] - batch.cu_seqlens.flip(0)
        if len(backwards) == 2:  # a graph made for one document would hold for no other number: let an empty one go before
            backwards = F.pad(backwards, (1, 0))
        layout = self._lay_out(backwards, is_strict=True, window_k=window_k)
        return self._run(model, {"input_ids": batch.input_ids.flip(1)}, batch.position_ids.flip(1), layout).flip(0)

    def describe(self) -> str:
        return flash_kernels.describe(self._head_dim)

    def _lay_out(self, cu_seqlens: Tensor, is_strict: bool, window_k: int) -> DocumentLayout:
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # the number of documents changes from batch to batch
        return DocumentLayout(cu_seqlens, self._max_length, is_strict, window_k)

    def _run(self, model: PreTrainedModel, inputs: dict[str, Tensor], position_ids: Tensor, layout: DocumentLayout) -> Tensor:
        outputs = model.base_model(**inputs, position_ids=position_ids, documents=layout, use_cache=False)
        return outputs.last_hidden_state[0]


class MaskedPasses:
    """Softmax attention: FlexAttention or SDPA under our masks.

    Args:
        by_blocks: FlexAttention attends, and takes BlockMasks.
        limits: of the layers' own windows, as `find_limits` gives them.
        row_width: of the model, d. On CPUs, SDPA may then get one document a row, where that `is_cheaper_in_rows`. None for
            models whose use of a mask is only checked on one row.
        is_compiled: the layers are, for each shape anew. Then rows must need no padding: else each pack would have its own shape.
    """

    def __init__(self, by_blocks: bool, limits: int | dict[str, int], row_width: int | None = None, is_compiled: bool = False):
        self._by_blocks = by_blocks
        self._limits = limits
        self._row_width = None if by_blocks else row_width
        self._is_compiled = is_compiled

    def describe(self) -> str:
        return "FlexAttention" if self._by_blocks else "PyTorch's SDPA"

    def encode_past(self, model: PreTrainedModel, batch: PackedBatch, embeddings: Tensor | None = None) -> Tensor:
        return self._run(model, _choose_inputs(batch.input_ids, embeddings), batch, "causal", window_k=0)

    def encode_future(self, model: PreTrainedModel, batch: PackedBatch, window_k: int) -> Tensor:
        return self._run(model, {"input_ids": batch.input_ids}, batch, "future", window_k)

    def _run(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], batch: PackedBatch, direction: Direction, window_k: int
    ) -> Tensor:
        inputs = {**inputs, "position_ids": batch.position_ids}
        rows = self._choose_rows(batch)
        masks = self._build_masks(batch.segment_ids[0], direction, window_k, rows)
        if rows is None:
            return model.base_model(**inputs, attention_mask=masks, use_cache=False).last_hidden_state[0]
        inputs = {name: rows.lay_out(values[0]) for name, values in inputs.items()}
        return rows.collect(model.base_model(**inputs, attention_mask=masks, use_cache=False).last_hidden_state)

    def _choose_rows(self, batch: PackedBatch) -> DocumentRows | None:
        """None leaves the pack one row. Asking a GPU for lengths would wait for it, so there it stays one."""
        if self._row_width is None or batch.cu_seqlens.is_cuda:
            return None
        rows = DocumentRows(batch.cu_seqlens, batch.input_ids.shape[1])
        if self._is_compiled and rows.num_places > rows.total:
            return None
        return rows if is_cheaper_in_rows(rows, self._row_width) else None

    def _build_masks(
        self, segment_ids: Tensor, direction: Direction, window_k: int, rows: DocumentRows | None = None
    ) -> AttentionMask | dict[str, AttentionMask]:
        def build(limit: int) -> AttentionMask:
            limit = tighten(limit, window_k)
            if rows is not None:
                return build_row_mask(rows.lengths, rows.longest, direction, limit)
            build_mask = build_block_mask if self._by_blocks else build_boolean_mask
            return build_mask(segment_ids, direction, limit)

        if isinstance(self._limits, dict):
            return {kind: build(limit) for kind, limit in self._limits.items()}
        return build(self._limits)


class DocumentRows:
    """A pack of S documents as rows: one document a row, padded with zeros on the right to the longest. Waits for the device.

    Args:
        cu_seqlens: int32 [S+1].
        total: T.
    """

    def __init__(self, cu_seqlens: Tensor, total: int):
        cu = cu_seqlens.long()
        self.lengths = cu.diff()
        """int64 [S]"""
        self.longest = int(self.lengths.max())
        self.total = total
        self.num_places = len(self.lengths) * self.longest
        """Padding included."""
        self._starts = cu[:-1]

    def lay_out(self, values: Tensor) -> Tensor:
        """[T, ...] -> [S, longest, ...]."""
        flat = values.new_zeros(self.num_places, *values.shape[1:])
        return flat.index_copy(0, self._places, values).unflatten(0, (len(self.lengths), self.longest))

    def collect(self, rows: Tensor) -> Tensor:
        """[S, longest, ...] -> [T, ...]."""
        return rows.flatten(0, 1).index_select(0, self._places)

    @cached_property
    def _places(self) -> Tensor:
        """int64 [T]: of each token in the rows, one behind the other."""
        token = torch.arange(self.total, device=self.lengths.device)
        row_starts = torch.arange(len(self.lengths), device=self.lengths.device) * self.longest
        return token + torch.repeat_interleave(row_starts - self._starts, self.lengths, output_size=self.total)


def is_cheaper_in_rows(rows: DocumentRows, width: int) -> bool:
    """Whether a model of that width likely does less arithmetic on documents as rows than under one mask across the pack, at a
    bounded price in memory."""
    in_rows, as_one = estimate_work(rows, width)
    return in_rows <= as_one and rows.num_places <= MOST_PLACES * rows.total


def estimate_work(rows: DocumentRows, width: int) -> tuple[int, int]:
    """Arithmetic of a layer, in queries times keys: S rows of the longest document, padding included, and one row of all T
    tokens under a mask of T x T. CPUs compute what a mask forbids."""
    others = KEYS_PER_WIDTH * width
    return rows.num_places * (others + rows.longest), rows.total * (others + rows.total)


class ReversedPasses:
    """Recurrent layers of flash-linear-attention, which reset their state at `cu_seqlens`, or read a row for each document."""

    def describe(self) -> str:
        return "flash-linear-attention"

    def encode_past(self, model: PreTrainedModel, batch: PackedBatch, embeddings: Tensor | None = None) -> Tensor:
        assert embeddings is None, "heads of several layers are refused for these families"
        return self._run(model, batch.input_ids, batch.cu_seqlens)

    def encode_future(self, model: PreTrainedModel, batch: PackedBatch, window_k: int) -> Tensor:
        assert not window_k, "a recurrence has no window"
        order = reverse_documents(batch.cu_seqlens, batch.input_ids.shape[1])
        return self._run(model, batch.input_ids[:, order], batch.cu_seqlens)[order]

    def _run(self, model: PreTrainedModel, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        if model.config.model_type in TAKES_ROWS:
            rows = DocumentRows(cu_seqlens, input_ids.shape[1])  # nothing reads the padding on the right
            outputs = model.base_model(input_ids=rows.lay_out(input_ids[0]), use_cache=False)
            return rows.collect(outputs.last_hidden_state)
        return model.base_model(input_ids=input_ids, cu_seqlens=cu_seqlens, use_cache=False).last_hidden_state[0]


def _choose_inputs(input_ids: Tensor, embeddings: Tensor | None) -> dict[str, Tensor]:
    return {"input_ids": input_ids} if embeddings is None else {"inputs_embeds": embeddings[None]}


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


def build_passes(attention: Attention, config: PretrainedConfig, max_length: int, is_compiled: bool = False) -> Passes:
    """The passes that go with a choice of `choose_attention`; no document is longer than max_length. is_compiled: the layers."""
    if attention == "varlen":
        return VarlenPasses(max_length, find_head_dim(config))
    if attention == "none":
        return ReversedPasses()
    row_width = config.hidden_size if find_family(config) else None
    return MaskedPasses(attention == "flex", find_limits(config), row_width, is_compiled)


def is_recurrent(config: PretrainedConfig) -> bool:
    """Whether the family is one of flash-linear-attention's, which take `cu_seqlens` instead of a mask."""
    return type(config).__module__.startswith("fla.")
