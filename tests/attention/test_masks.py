"""The mask functions against a brute-force definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flame.attention.kernel_masks import (
    BLOCK_SIZE,
    _list_blocks,
    _mask_mod,
    build_block_mask,
    build_boolean_mask,
)
from flame.attention.masks import find_anchors
from flame.train import _future_valid_from_cu, _segment_ids_from_cu_seqlens, build_future_mask_from_cu

lengths_of_packs = st.lists(st.integers(1, 9), min_size=1, max_size=6)
windows = st.sampled_from([None, 0, 1, 2, 3, 7, 100])


def to_cu(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


def document_of(lengths: list[int]) -> list[int]:
    return [document for document, length in enumerate(lengths) for _ in range(length)]


def allowed_by_definition(lengths: list[int], window: int | None) -> list[list[bool]]:
    document = document_of(lengths)
    horizon = window or len(document)
    return [[document[q] == document[kv] and 0 < kv - q <= horizon for kv in range(len(document))] for q in range(len(document))]


@given(
    lengths_of_packs,
    windows,
    st.sampled_from([torch.int32, torch.int64]),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_mask_and_validity_follow_the_definition(lengths, window, index_dtype, two_dimensional, dtype):
    dtype = getattr(torch, dtype)
    cu = to_cu(lengths, index_dtype)
    cu = cu[None] if two_dimensional else cu
    expected = torch.tensor(allowed_by_definition(lengths, window))

    mask, valid = build_future_mask_from_cu(cu, window, dtype, "cpu")

    total = sum(lengths)
    assert mask.shape == (1, 1, total, total) and mask.dtype == dtype
    assert torch.equal(mask[0, 0] == 0, expected)
    assert torch.equal(mask[0, 0] == -torch.finfo(dtype).max, ~expected)
    assert torch.equal(valid, expected.any(-1)[None])
    assert torch.equal(_future_valid_from_cu(cu, window, "cpu"), valid)


@given(lengths_of_packs, st.booleans())
def test_segment_ids(lengths, two_dimensional):
    cu = to_cu(lengths)
    segment_id, total = _segment_ids_from_cu_seqlens(cu[None] if two_dimensional else cu)
    assert segment_id.tolist() == document_of(lengths)
    assert total == sum(lengths)


@pytest.mark.parametrize("cu", [torch.tensor([0], dtype=torch.int32), torch.tensor([[0]], dtype=torch.int64)])
def test_empty_pack(cu):
    assert build_future_mask_from_cu(cu, None, torch.float32, "cpu") == (None, None)
    assert _future_valid_from_cu(cu, 4, "cpu") is None
    segment_id, total = _segment_ids_from_cu_seqlens(cu)
    assert segment_id.numel() == 0 and total == 0


def test_single_token_documents_have_no_future():
    mask, valid = build_future_mask_from_cu(to_cu([1, 1, 1]), None, torch.float32, "cpu")
    assert (mask != 0).all() and not valid.any()


@given(lengths_of_packs, st.integers(0, 12))
def test_anchors_have_their_target_in_their_document(lengths, shift):
    document = document_of(lengths)
    ahead = max(shift, 1)
    expected = [t + ahead < len(document) and document[t + ahead] == document[t] for t in range(len(document))]
    assert find_anchors(torch.tensor(document), shift).tolist() == expected
    assert sum(expected) == sum(max(length - ahead, 0) for length in lengths)


@given(lengths_of_packs, windows)
def test_the_mask_the_model_runs_on_is_the_reference(lengths, window):
    segment_ids = torch.tensor(document_of(lengths))
    future = build_boolean_mask(segment_ids, "future", window or 0)
    assert future.dtype == torch.bool
    assert torch.equal(future[0, 0], torch.tensor(allowed_by_definition(lengths, window)))
    causal = build_boolean_mask(segment_ids, "causal", window or 0)
    assert torch.equal(causal[0, 0], future[0, 0].t() | torch.eye(len(segment_ids), dtype=torch.bool))


@pytest.mark.parametrize("direction", ["causal", "future"])
@given(
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(100, 400)), min_size=1, max_size=8),
    window=st.sampled_from([0, 1, 64, 127, 128, 129, 255, 256, 300]),
)
@example(lengths=[1], window=0)
@example(lengths=[1] * 300, window=0)
@example(lengths=[7, *[1] * 249, 128], window=1)
@example(lengths=[640], window=0)
@example(lengths=[640], window=255)
@example(lengths=[641], window=256)
@example(lengths=[639], window=0)
@example(lengths=[639], window=2**40)
@example(lengths=[128, 256, 128], window=0)
@example(lengths=[127, 257, 300], window=129)
def test_closed_form_blocks_equal_those_of_create_block_mask(direction, lengths, window):
    segment_ids = torch.tensor(document_of(lengths), dtype=torch.int32)
    total = len(segment_ids)
    ours = build_block_mask(segment_ids, direction, window)
    theirs = create_block_mask(_mask_mod(segment_ids, direction, window), None, None, total, total, device="cpu")

    blocks = -(-total // BLOCK_SIZE)
    padded = torch.zeros(blocks * BLOCK_SIZE, blocks * BLOCK_SIZE, dtype=torch.bool)
    padded[:total, :total] = build_boolean_mask(segment_ids, direction, window)[0, 0]
    pairs = padded.view(blocks, BLOCK_SIZE, blocks, BLOCK_SIZE).sum((1, 3))
    full = pairs == BLOCK_SIZE**2
    partial = (pairs > 0) & ~full
    # The diagonal is always visited: the closed form does not ask whether a block of single-token documents is empty.
    visited = partial | torch.eye(blocks, dtype=torch.bool)

    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for mask, expected in ((ours, visited), (theirs, partial)):
        assert _listed(mask.kv_num_blocks, mask.kv_indices) == expected.nonzero().tolist()
        assert _listed(mask.q_num_blocks, mask.q_indices) == expected.t().nonzero().tolist()
        assert _listed(mask.full_kv_num_blocks, mask.full_kv_indices) == full.nonzero().tolist()
        assert _listed(mask.full_q_num_blocks, mask.full_q_indices) == full.t().nonzero().tolist()
    for mine, reference in zip(_tensors(ours, "num_blocks"), _tensors(theirs, "num_blocks"), strict=True):
        assert mine.shape == reference.shape and mine.dtype == reference.dtype and mine.is_contiguous()
    for mine, reference in zip(_tensors(ours, "indices"), _tensors(theirs, "indices"), strict=True):
        assert mine.shape == reference.shape and mine.dtype == reference.dtype and mine.is_contiguous()
        assert mine.min() >= 0 and mine.max() < blocks  # unused entries too: kernels read the first one of an empty row


def _listed(counts: torch.Tensor, indices: torch.Tensor) -> list[list[int]]:
    """The (row, block) pairs of a list, by row, in the order of the list."""
    return [[row, block] for row, count in enumerate(counts[0, 0]) for block in indices[0, 0, row, :count].tolist()]


def _tensors(mask: BlockMask, suffix: str) -> list[torch.Tensor]:
    return [getattr(mask, f"{kind}_{suffix}") for kind in ("kv", "full_kv", "q", "full_q")]


@pytest.mark.parametrize("lengths, window", [([60, 300, 1, 279], 640), ([60, 300, 1, 300], 661), ([60, 300, 1, 300], 200)])
def test_compiled_lists_equal_eager_ones(lengths, window):
    segment_ids = torch.tensor(document_of(lengths), dtype=torch.int32)
    compiled = torch.compile(_list_blocks, dynamic=False, fullgraph=True, backend="aot_eager")
    for lists, reference in zip(compiled(segment_ids, window), _list_blocks(segment_ids, window), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(lists, reference, strict=True))
