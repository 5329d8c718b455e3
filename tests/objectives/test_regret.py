"""Regret against its definition as a plain loop in float64, with the library's model under a mask written out."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from flame.attention import backends
from flame.attention.backends import MaskedBackend, VarlenBackend
from flame.attention.families import find_limits
from flame.attention.kernel_masks import build_block_mask, build_boolean_mask
from flame.data.batch import NO_LABEL, PackedBatch
from flame.models.wrapper import TrainingModel
from flame.objectives.registry import BUILT_IN
from flame.objectives.step import Requested, compute_losses
from tests.support.answers import build_pack, split_documents
from tests.support.families import build_toy
from tests.support.models import build_unsharded, random_batch, random_cu_seqlens
from tests.support.objectives import build_objective, choose


def sees(teacher: str, query: int, key: int) -> bool:
    return key != query + 1 if teacher == "global" else key <= query + 1


def compute_by_loop(model: TrainingModel, batch: PackedBatch, teacher: str) -> tuple[Tensor, float]:
    """The divergence, and the teacher's cross entropy, one document and one position at a time."""
    total, teacher_ce = torch.zeros((), dtype=torch.float64), 0.0
    for document in split_documents(batch):
        length = document.input_ids.shape[1]
        allowed = torch.tensor([[sees(teacher, q, k) for k in range(length)] for q in range(length)])[None, None]
        with torch.no_grad():
            logits = model.lm(document.input_ids, attention_mask=allowed, use_cache=False).logits[0]
        student = model.lm(document.input_ids, use_cache=False).logits[0]
        for t, label in enumerate(document.labels[0].tolist()):
            if label != NO_LABEL:
                p, q = torch.softmax(logits[t], 0), torch.softmax(student[t], 0)
                total = total + (p * (p / q).log()).sum()
                teacher_ce -= p[label].log().item()
    return total, teacher_ce


@pytest.mark.parametrize("teacher", ["global", "local"])
@pytest.mark.parametrize("kept", ["all", "answers"])
@pytest.mark.parametrize("in_rows", [False, True])
def test_it_is_its_definition(teacher, kept, in_rows):
    model = build_objective("regret", teacher=teacher).double()
    batch = random_batch(random_cu_seqlens(24, 5, seed=1)) if kept == "all" else build_pack([(11, 3), (4, 0), (6, 5)])
    found = []
    for is_ours in (True, False):
        model.zero_grad()
        with patch.object(backends, "is_cheaper_in_rows", return_value=in_rows):
            if is_ours:
                aux = model(compute_losses, batch, Requested(aux=True, ce=False)).aux
                loss, teacher_ce = aux.loss_sum, aux.measures["regret_teacher_ce"].total.item()
            else:
                loss, teacher_ce = compute_by_loop(model, batch, teacher)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.lm.parameters()])
        found.append((loss.detach(), teacher_ce, gradient))
    (loss, ce, gradient), (expected, expected_ce, expected_gradient) = found
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-9)
    assert ce == pytest.approx(expected_ce, rel=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("view", ["all_but_next", "one_ahead"])
@pytest.mark.parametrize("window", [0, 1, 100])
def test_the_block_mask_is_the_boolean_mask(view, window):
    """At every pair, over documents that end inside blocks and at their edges."""
    lengths = [1, 127, 128, 3, 200, 85]
    segments = torch.repeat_interleave(torch.arange(6, dtype=torch.int32), torch.tensor(lengths))
    expected = build_boolean_mask(segments, view, window)[0, 0]
    mask, total = build_block_mask(segments, view, window), len(segments)
    index = torch.arange(total)
    by_rule = mask.mask_mod(None, None, index[:, None], index[None, :])
    blocks = -(-total // 128)
    for counts, indices, is_transposed in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.q_num_blocks, mask.q_indices, True),
    ):
        listed = torch.zeros(blocks, blocks, dtype=torch.bool)
        for row in range(blocks):
            listed[row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
        listed = (listed.T if is_transposed else listed).repeat_interleave(128, 0).repeat_interleave(128, 1)[:total, :total]
        assert torch.equal(by_rule & listed, expected)
    assert not mask.full_kv_num_blocks.any() and not mask.full_q_num_blocks.any()


def test_beside_flash_attention_the_teacher_attends_under_a_mask():
    """The kernel is another one inside that forward alone."""
    model = build_objective("regret")
    batch, other = random_batch(random_cu_seqlens(24, 5, seed=1)), build_objective("regret")
    config = other.lm.config
    other._backend = VarlenBackend(24, 8, MaskedBackend("sdpa", find_limits(config)))
    config._attn_implementation = "flame_varlen"
    found = other.encode_privileged(batch, "all_but_next")
    assert config._attn_implementation == "flame_varlen"
    torch.testing.assert_close(found, model.encode_privileged(batch, "all_but_next"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.encode_past(batch), model.encode_past(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mistral", "gpt_oss"])
@pytest.mark.parametrize("teacher", ["global", "local"])
def test_the_teacher_of_other_families_stays_in_its_document(family, teacher):
    """Windows, sinks, capped scores: each document alone gives the same states, and the future is seen."""
    model = build_unsharded(choose("regret", teacher=teacher), build_toy(family))
    view, batch = model.objective.view, random_batch(torch.tensor([0, 1, 8, 30], dtype=torch.int32))
    states = model.encode_privileged(batch, view)
    alone = torch.cat([model.encode_privileged(part, view) for part in split_documents(batch)])
    torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)
    changed = batch.input_ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 61
    moved = (model.encode_privileged(build_changed(batch, changed), view) != states).any(dim=-1).nonzero().flatten()
    assert moved.min() >= 8 and 19 in moved.tolist()


def build_changed(batch: PackedBatch, input_ids: Tensor) -> PackedBatch:
    from dataclasses import replace

    return replace(batch, input_ids=input_ids)


def test_models_without_masks_are_refused():
    recurrent = type("GLAConfig", (LlamaConfig,), {"__module__": "fla.models.gla"})(max_position_embeddings=4096)
    kind = BUILT_IN["regret"]
    (line,) = kind.load().find_model_conflicts(kind.options(), recurrent)
    assert line.startswith('objective.name = "regret"') and "mask" in line
