"""The attention backends: how a network reads a packed batch in either direction.

`VarlenBackend`: softmax attention in half precision on GPUs, by flash kernels that skip other documents. The anti-causal pass
reads the packed sequence backwards, under strictly causal attention.
`MaskedBackend`: softmax attention elsewhere. The anti-causal pass is the same forward under an anti-causal mask. On CPUs, each
document becomes a row of its own if padding costs less than attention across the packed sequence.
`RecurrentBackend`: recurrent layers (linear attention, state-space models). The anti-causal pass reverses each document, runs
the forward, and reverses the result back. Such a summary always includes its own token.

In every case, summary t depends only on tokens t .. end of its document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.attention import dense
from flame.attention import flash as flash_kernels
from flame.attention.document_rows import DocumentRows, is_cheaper_in_rows
from flame.attention.families import find_family, find_limits, find_score_cap, tighten
from flame.attention.fla_families import TAKES_ROWS
from flame.attention.kernel_masks import (
    AttentionMask,
    Direction,
    Privileged,
    build_block_mask,
    build_boolean_mask,
    build_row_mask,
)
from flame.attention.sinks import IMPLEMENTATION as WITH_SINKS
from flame.attention.varlen import IMPLEMENTATION, WIDEST_HEAD, DocumentLayout
from flame.errors import UserError


class PackedTokens(Protocol):
    """The fields of a packed batch that the passes read; shapes as in `flame.data.batch.PackedBatch`."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def segment_ids(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor: ...


class AttentionBackend(Protocol):
    """Runs a model over a packed batch of T tokens in either direction. Computes no logits."""

    def encode_past(self, model: PreTrainedModel, batch: PackedTokens, embeddings: Tensor | None = None) -> Tensor:
        """Final hidden states [T, d] of the causal forward. Embeddings [T, d], if given, replace those of the tokens."""
        ...

    def encode_future(self, model: PreTrainedModel, batch: PackedTokens, window_k: int) -> Tensor:
        """Final hidden states [T, d] of the anti-causal forward; window_k is `future_encoder.future_k`."""
        ...

    def encode_privileged(self, model: PreTrainedModel, batch: PackedTokens, view: Privileged) -> Tensor:
        """Final hidden states [T, d] of a forward in which tokens see what comes after them. It need not have a gradient."""
        ...

    def flatten(self, states: Tensor, batch: PackedTokens, *, ahead: bool = False) -> Tensor:
        """Lay the output of a module inside the causal pass (`ahead`: inside the anti-causal pass) out as the pass's result:
        [rows, positions, d] -> [T, d]."""
        ...

    def describe(self) -> str:
        """Name of the attention kernel, for the log."""
        ...


class VarlenBackend:
    """Softmax attention by `flame.attention.varlen`.

    Args:
        max_length: upper bound of the document lengths in all batches.
        head_dim: largest width of the heads.
        masked: runs what the flash kernels have no mask for.
    """

    def __init__(self, max_length: int, head_dim: int, masked: MaskedBackend | None = None):
        self._max_length = max_length
        self._head_dim = head_dim
        self._masked = masked

    def encode_past(self, model: PreTrainedModel, batch: PackedTokens, embeddings: Tensor | None = None) -> Tensor:
        layout = self._lay_out(batch.cu_seqlens, is_strict=False, window_k=0)
        states = self._run(model, _choose_inputs(batch.input_ids, embeddings), batch.position_ids, layout)
        return self.flatten(states, batch)

    def encode_future(self, model: PreTrainedModel, batch: PackedTokens, window_k: int) -> Tensor:
        backwards = batch.input_ids.shape[1] - batch.cu_seqlens.flip(0)
        if len(backwards) == 2:  # torch.compile would specialize its graph to one document: put an empty one before it
            backwards = F.pad(backwards, (1, 0))
        layout = self._lay_out(backwards, is_strict=True, window_k=window_k)
        states = self._run(model, {"input_ids": batch.input_ids.flip(1)}, batch.position_ids.flip(1), layout)
        return self.flatten(states, batch, ahead=True)

    def encode_privileged(self, model: PreTrainedModel, batch: PackedTokens, view: Privileged) -> Tensor:
        assert self._masked is not None
        return self._masked.encode_privileged(model, batch, view)

    def flatten(self, states: Tensor, batch: PackedTokens, *, ahead: bool = False) -> Tensor:
        return states[0].flip(0) if ahead else states[0]

    def describe(self) -> str:
        return flash_kernels.describe(self._head_dim)

    def _lay_out(self, cu_seqlens: Tensor, is_strict: bool, window_k: int) -> DocumentLayout:
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # the number of documents changes from batch to batch
        return DocumentLayout(cu_seqlens, self._max_length, is_strict, window_k)

    def _run(self, model: PreTrainedModel, inputs: dict[str, Tensor], position_ids: Tensor, layout: DocumentLayout) -> Tensor:
        return model.base_model(**inputs, position_ids=position_ids, documents=layout, use_cache=False).last_hidden_state


class MaskedBackend:
    """Softmax attention by FlexAttention, SDPA or `flame.attention.dense`, under the masks of `flame.attention.kernel_masks`.

    Args:
        attention: "flex", with BlockMasks, or "sdpa" or "dense", with boolean masks.
        limits: of the layers' own windows, from `find_limits`.
        row_width: width d of the model. If given, boolean masks on CPUs are of one document per row where that
            `is_cheaper_in_rows`. None for models that are only tested with masks over one row.
        is_compiled: the layers are compiled, once per shape. Rows are then used only if they need no padding. Otherwise each
            packed sequence would have its own shape.
    """

    def __init__(
        self, attention: Attention, limits: int | dict[str, int], row_width: int | None = None, is_compiled: bool = False
    ):
        self._attention = attention
        self._limits = limits
        self._row_width = None if attention == "flex" else row_width
        self._is_compiled = is_compiled

    def describe(self) -> str:
        return {"flex": "FlexAttention", "sdpa": "PyTorch's SDPA", "dense": "dense products"}[self._attention]

    def encode_past(self, model: PreTrainedModel, batch: PackedTokens, embeddings: Tensor | None = None) -> Tensor:
        return self._run(model, _choose_inputs(batch.input_ids, embeddings), batch, "causal", window_k=0)

    def encode_future(self, model: PreTrainedModel, batch: PackedTokens, window_k: int) -> Tensor:
        return self._run(model, {"input_ids": batch.input_ids}, batch, "future", window_k)

    def encode_privileged(self, model: PreTrainedModel, batch: PackedTokens, view: Privileged) -> Tensor:
        with _attend_by(model, self._attention):
            return self._run(model, {"input_ids": batch.input_ids}, batch, view, window_k=0)

    def _run(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], batch: PackedTokens, direction: Direction, window_k: int
    ) -> Tensor:
        inputs = {**inputs, "position_ids": batch.position_ids}
        rows = self._choose_rows(batch)
        masks = self._build_masks(batch.segment_ids[0], direction, window_k, rows)
        if rows is not None:
            inputs = {name: rows.lay_out(values[0]) for name, values in inputs.items()}
        return self.flatten(model.base_model(**inputs, attention_mask=masks, use_cache=False).last_hidden_state, batch)

    def flatten(self, states: Tensor, batch: PackedTokens, *, ahead: bool = False) -> Tensor:
        rows = self._choose_rows(batch)
        return states[0] if rows is None else rows.collect(states)

    def _choose_rows(self, batch: PackedTokens) -> DocumentRows | None:
        """One row per document, or None for a single row. On GPUs always None, since reading the lengths would synchronize."""
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
            build_mask = build_block_mask if self._attention == "flex" else build_boolean_mask
            return build_mask(segment_ids, direction, limit)

        if isinstance(self._limits, dict):
            return {kind: build(limit) for kind, limit in self._limits.items()}
        return build(self._limits)


@contextmanager
def _attend_by(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Inside, the model's layers attend by a kernel that takes masks. The layers look the kernel up in each forward."""
    config, before = model.config, model.config._attn_implementation
    config._attn_implementation = name_implementation(attention, config)
    try:
        yield
    finally:
        config._attn_implementation = before


class RecurrentBackend:
    """Recurrent layers of flash-linear-attention. They reset their state at `cu_seqlens`, or get one document per row."""

    def describe(self) -> str:
        return "flash-linear-attention"

    def encode_past(self, model: PreTrainedModel, batch: PackedTokens, embeddings: Tensor | None = None) -> Tensor:
        assert embeddings is None, "objectives that run the model on embeddings are rejected for these families"
        return self._run(model, batch, batch.input_ids)

    def encode_future(self, model: PreTrainedModel, batch: PackedTokens, window_k: int) -> Tensor:
        assert not window_k, "a recurrence has no window"
        order = reverse_documents(batch.cu_seqlens, batch.input_ids.shape[1])
        return self._run(model, batch, batch.input_ids[:, order])[order]

    def encode_privileged(self, model: PreTrainedModel, batch: PackedTokens, view: Privileged) -> Tensor:
        raise NotImplementedError("objectives that need it are rejected for these families")

    def flatten(self, states: Tensor, batch: PackedTokens, *, ahead: bool = False) -> Tensor:
        total = batch.input_ids.shape[1]
        is_one_row = states.shape[:2] == (1, total)
        flat = states[0] if is_one_row else DocumentRows(batch.cu_seqlens, total).collect(states)
        return flat[reverse_documents(batch.cu_seqlens, total)] if ahead else flat

    def _run(self, model: PreTrainedModel, batch: PackedTokens, input_ids: Tensor) -> Tensor:
        cu_seqlens = batch.cu_seqlens
        if model.config.model_type in TAKES_ROWS:
            rows = DocumentRows(cu_seqlens, input_ids.shape[1])  # padding on the right cannot reach the tokens
            outputs = model.base_model(input_ids=rows.lay_out(input_ids[0]), use_cache=False)
        else:
            outputs = model.base_model(input_ids=input_ids, cu_seqlens=cu_seqlens, use_cache=False)
        return self.flatten(outputs.last_hidden_state, batch)


def _choose_inputs(input_ids: Tensor, embeddings: Tensor | None) -> dict[str, Tensor]:
    return {"input_ids": input_ids} if embeddings is None else {"inputs_embeds": embeddings[None]}


def reverse_documents(cu_seqlens: Tensor, total: int) -> Tensor:
    """Index that reverses each document where it is. It is its own inverse.

    Args:
        cu_seqlens: int32 [S+1].
        total: T. Passed in, since reading it from `cu_seqlens` would wait for the device.

    Returns:
        int64 [T]: token t of a document [a, b) goes to a + b - 1 - t.
    """
    cu = cu_seqlens.long()
    starts_plus_ends = torch.repeat_interleave(cu[:-1] + cu[1:], cu[1:] - cu[:-1], output_size=total)
    return starts_plus_ends - 1 - torch.arange(total, device=cu.device)


Attention = Literal["varlen", "flex", "sdpa", "dense", "none"]


def choose_attention(config: PretrainedConfig, device_type: str, dtype: torch.dtype) -> Attention:
    """Choose the attention kernel by family, device and dtype of the activations. "none": flash-linear-attention's own layers.

    The flash kernels support bfloat16 and heads of up to `WIDEST_HEAD`, for families whose code passes on the document
    boundaries. FlexAttention needs heads of `NARROWEST_FLEX_HEAD` or more. It applies sinks in the dtype of the activations,
    which is exact enough in float32 alone. Neither the flash kernels nor SDPA cap scores.
    """
    if is_recurrent(config):
        return "none"
    is_capped = find_score_cap(config) is not None
    if device_type != "cuda":
        return "dense" if is_capped else "sdpa"
    widths, family = find_head_dims(config), find_family(config)
    fits = dtype == torch.bfloat16 and max(widths) <= WIDEST_HEAD and max(widths) % 8 == 0 and not is_capped
    if family is not None and fits and flash_kernels.is_supported():
        return "varlen"
    return _choose_masked(config, dtype)


def _choose_masked(config: PretrainedConfig, dtype: torch.dtype) -> Attention:
    """The kernel for GPUs that takes masks."""
    family = find_family(config)
    takes_flex = family is None or (family.takes_flex and (dtype == torch.float32 or not family.has_sinks))
    by_mask: Attention = "sdpa" if find_score_cap(config) is None else "dense"
    return "flex" if takes_flex and min(find_head_dims(config)) >= NARROWEST_FLEX_HEAD else by_mask


def name_implementation(attention: Attention, config: PretrainedConfig) -> str:
    """Name in transformers (`attn_implementation`) of a result of `choose_attention`, other than "none"."""
    family = find_family(config)
    by_mask = WITH_SINKS if family is not None and family.has_sinks else "sdpa"
    return {"varlen": IMPLEMENTATION, "flex": "flex_attention", "sdpa": by_mask, "dense": dense.IMPLEMENTATION}[attention]


NARROWEST_FLEX_HEAD = 16
"""Width of a head. Torch's FlexAttention compiles for none that is narrower (torch 2.11)."""
SHORTEST_FLEX = 128
"""Tokens. Torch has another kernel for shorter queries ("flex_decoding"), which under our masks in compiled layers gave wrong
results on 64 tokens, and on 127, compiled or not, none, but a traceback (torch 2.11; tests marked gpu)."""


def check_attention(attention: Attention, seq_len: int) -> None:
    """Refuse packed sequences that FlexAttention computes wrongly.

    Raises:
        UserError: they are too short.
    """
    if attention == "flex" and seq_len < SHORTEST_FLEX:
        raise UserError(
            f"training.seq_len = {seq_len}: this model attends by FlexAttention, which is right only on packed sequences of "
            f"{SHORTEST_FLEX} tokens or more: raise it"
        )


def find_head_dims(config: PretrainedConfig) -> tuple[int, int]:
    """Width of one attention head in queries and keys, and in values.

    They differ in multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), where `head_dim` is that of the rotary part.
    """
    without, rotary = (getattr(config, f"qk_{part}_head_dim", None) for part in ("nope", "rope"))
    if without and rotary:
        return without + rotary, getattr(config, "v_head_dim", None) or without + rotary
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width, width


def build_backend(attention: Attention, config: PretrainedConfig, max_length: int, is_compiled: bool = False) -> AttentionBackend:
    """Build the backend for a result of `choose_attention`. See the backends for `max_length` and `is_compiled`."""
    if attention == "varlen":
        masked = MaskedBackend(_choose_masked(config, torch.bfloat16), find_limits(config))
        return VarlenBackend(max_length, max(find_head_dims(config)), masked)
    if attention == "none":
        return RecurrentBackend()
    row_width = config.hidden_size if find_family(config) else None
    return MaskedBackend(attention, find_limits(config), row_width, is_compiled)


def is_recurrent(config: PretrainedConfig) -> bool:
    """Whether the family is from flash-linear-attention. Those models take `cu_seqlens` instead of a mask."""
    return type(config).__module__.startswith("fla.")
