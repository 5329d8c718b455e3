"""Attention sinks, dense and by the flash path, against the formula written out, in float64."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from flame.attention import sinks
from flame.attention.kernel_masks import Direction, build_boolean_mask
from flame.attention.varlen import DocumentLayout, attend
from flame.trainer import setup
from tests.support.families import build_toy
from tests.support.models import build_unsharded, future_config, random_batch, random_cu_seqlens

TOTAL, HEADS, GROUPS, WIDTH, SCALE = 9, 4, 2, 5, 0.3
LAST = torch.tensor([0, 1, 4, 9], dtype=torch.int32)


def draw(seed: int = 0, value_width: int = WIDTH) -> list[Tensor]:
    """Queries, keys, values, sinks: float64, with gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, HEADS, TOTAL, WIDTH), (1, GROUPS, TOTAL, WIDTH), (1, GROUPS, TOTAL, value_width), (HEADS,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def write_out(states: list[Tensor], cu: Tensor, direction: Direction, window: int) -> Tensor:
    """[1, T, H, V]: a softmax over the scores and the sink, for one query and head at a time."""
    query, key, value, sink = states
    document = torch.bucketize(torch.arange(TOTAL), cu[1:], right=True)
    rows = []
    for q in range(TOTAL):
        sign = 1 if direction == "causal" else -1
        reach = range(0 if direction == "causal" else 1, (window or TOTAL) + 1)
        keys = [q - sign * back for back in reach if 0 <= q - sign * back < TOTAL and document[q - sign * back] == document[q]]
        per_head = []
        for h in range(HEADS):
            group = h * GROUPS // HEADS
            logits = [key[0, group, k] @ query[0, h, q] * SCALE for k in keys]
            weights = torch.softmax(torch.stack([*logits, sink[h]]), dim=0)
            per_head.append(sum((w * value[0, group, k] for w, k in zip(weights, keys, strict=False)), 0 * value[0, 0, 0]))
        rows.append(torch.stack(per_head))
    return torch.stack(rows)[None]


def attend_densely(states: list[Tensor], cu: Tensor, direction: Direction, window: int) -> Tensor:
    document = torch.bucketize(torch.arange(TOTAL), cu[1:], right=True)
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // GROUPS
    mask = build_boolean_mask(document, direction, window)
    return sinks.attend(module, *states[:3], mask, s_aux=states[3], scaling=SCALE)[0]


def attend_by_flash(states: list[Tensor], cu: Tensor, direction: Direction, window: int) -> Tensor:
    is_strict = direction == "future"
    query, key, value = (each.flip(2) if is_strict else each for each in states[:3])
    layout = DocumentLayout(TOTAL - cu.flip(0) if is_strict else cu, TOTAL, is_strict, window)
    found = attend(torch.nn.Module(), query, key, value, None, documents=layout, scaling=SCALE, s_aux=states[3])[0]
    return found.flip(1) if is_strict else found


either = pytest.mark.parametrize("attend_", [attend_densely, attend_by_flash], ids=["dense", "flash"])
directions = pytest.mark.parametrize("direction", ["causal", "future"])


@either
@directions
@given(value_width=st.sampled_from([WIDTH, 3, 7]), seed=st.integers(0, 1000), window=st.sampled_from([0, 1, 3]))
def test_outputs_and_gradients_are_those_of_the_formula(attend_, direction, value_width, seed, window):
    states, cu = draw(seed, value_width), random_cu_seqlens(TOTAL, 4, seed)
    found, expected = attend_(states, cu, direction, window), write_out(states, cu, direction, window)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(out, states, weights) for out in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@either
def test_a_query_without_keys_gives_exactly_zero(attend_):
    states = draw()
    out = attend_(states, LAST, "future", 0)
    last = LAST[1:].long() - 1
    assert (out[0, last] == 0).all() and (out[0, [1, 2, 4]] != 0).all()
    gradients = torch.autograd.grad(out[0, last].sum(), states)
    assert not any(gradient.any() for gradient in gradients)


def test_without_masks_it_is_refused():
    query, key, value, sink = draw()
    for mask in (None, torch.zeros(1, 1, TOTAL, TOTAL)):
        with pytest.raises(NotImplementedError, match="runs under the boolean masks"):
            sinks.attend(torch.nn.Module(), query, key, value, mask, s_aux=sink)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_gradients_of_a_model_are_those_of_transformers(attention):
    """Of all weights, with sinks that differ by head; in float64, which grouped products of experts do not know."""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(build_toy("gpt_oss", initializer_range=0.3), dtype=torch.float64)
    assert reference.config._attn_implementation == "eager"
    with patch.object(setup, "choose_attention", lambda *_: attention):
        model = build_unsharded(future_config(), build_toy("gpt_oss")).double()
    model.lm.load_state_dict(reference.state_dict())
    for lm in (model.lm, reference):
        lm.set_experts_implementation("eager")
    batch = random_batch(torch.tensor([0, 30], dtype=torch.int32))
    weights = torch.randn(30, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (model.encode_past(batch) * weights).sum().backward()
    (reference.base_model(batch.input_ids).last_hidden_state[0] * weights).sum().backward()
    found, expected = ({name: p.grad for name, p in lm.named_parameters()} for lm in (model.lm, reference))
    assert found["model.layers.0.self_attn.sinks"].abs().min() > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-8, msg=name)
