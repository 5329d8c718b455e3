"""The library on a GPU, against the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from flame import FutureLoss, check_leaks, encode_future, encode_past
from flame.attention.families import FAMILIES
from flame.library.passes import choose
from tests.support.families import TOYS
from tests.support.library import CU, build, draw, list_documents, small

pytestmark = pytest.mark.gpu
LONG = torch.tensor([0, 100, 101, 230, 300], dtype=torch.int32)
SHAPE = {"max_position_embeddings": 512, "hidden_size": 64, "head_dim": 16}
"""Heads that FlexAttention takes."""


@pytest.mark.parametrize("cu", [CU, LONG], ids=["30 tokens", "300 tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TOYS)
@torch.no_grad()
def test_both_passes_of_families_are_the_cpus_and_do_not_leak(name, dtype, cu):
    has_experts = FAMILIES[TOYS[name][0]].has_experts
    tokens = draw(int(cu[-1]))
    lm = build(name, "eager", **SHAPE)
    expected = encode_past(lm, tokens, cu), encode_future(lm, tokens, cu)
    lm = lm.to("cuda", dtype)
    found = encode_past(lm, tokens, cu), encode_future(lm, tokens, cu)
    for ours, reference in zip(found, expected, strict=True):
        differences = (ours.float().cpu() - reference).norm(dim=-1)
        # A router's choice between experts turns on rounding: most tokens, not all, take the same ones.
        difference = differences.sort().values[: round(len(tokens) * (0.75 if has_experts else 1.0))].norm() / reference.norm()
        assert difference < (0.002 if dtype == torch.float32 else 0.1), difference
    if has_experts:  # tokens of one expert are rounded together
        return
    start, end = list_documents(cu)[2]
    place = (start + end) // 2
    other = tokens.index_fill(0, torch.tensor([place]), int(tokens[place] + 1) % 61)
    changed = [
        (a != b).any(-1).cpu() for a, b in zip(found, (encode_past(lm, other, cu), encode_future(lm, other, cu)), strict=True)
    ]
    assert not changed[0][:place].any() and not changed[0][end:].any() and changed[0][place]
    assert not changed[1][:start].any() and not changed[1][place + 1 :].any() and changed[1][place]


@pytest.mark.parametrize("mode", ["float32", "autocast", "bfloat16", "checkpointed"])
def test_losses_and_gradients_are_the_cpus(mode):
    tokens = draw(300)
    reference = build(attention="eager", **SHAPE).train()
    lm = copy.deepcopy(reference).to("cuda", torch.float32 if mode in ("float32", "autocast") else torch.bfloat16)
    if mode == "checkpointed":
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    losses, gradients = [], []
    weights = None
    for model in (reference, lm):
        torch.manual_seed(0)
        future = FutureLoss(model)
        weights = weights or copy.deepcopy(future.state_dict())
        future.load_state_dict(weights)
        device = next(model.parameters()).device.type
        with torch.autocast("cuda", torch.bfloat16, enabled=mode == "autocast" and device == "cuda"):
            hidden = future.encode(tokens, LONG)
            loss = future.next_token_loss(hidden, tokens, LONG) + future(hidden, tokens, LONG)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.float().cpu().flatten() for p in [*model.parameters(), *future.parameters()]]))
    exact = mode == "float32"
    assert abs(losses[0] - losses[1]) < (1e-3 if exact else 0.03) * losses[0]
    assert (gradients[0] - gradients[1]).norm() < (0.01 if exact else 0.15) * gradients[0].norm()


def test_attention_is_chosen_by_what_it_must_do():
    lm = build(attention="eager", dtype=torch.bfloat16, attention_dropout=0.5, **SHAPE).cuda()
    assert choose(lm, 300) == "varlen"
    assert choose(lm.float(), 300) == "flex" and choose(lm, 30) == "sdpa"
    with torch.autocast("cuda", torch.bfloat16):
        assert choose(lm, 300) == "varlen"
    assert choose(lm.train(), 300) == "sdpa"
    assert encode_past(lm, draw(300), LONG).isfinite().all()


def test_an_unknown_family_is_checked_by_both_masks():
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(small("stablelm", use_cache=False, hidden_size=64, head_dim=16)).cuda()
    report = check_leaks(lm)
    assert report.is_usable and len(report.masked) == 7 * len({choose(lm, 30), choose(lm, 300)})
    for tokens, cu in ((draw(), CU), (draw(300), LONG)):
        alone = [lm.base_model(tokens[None, start:end].cuda()).last_hidden_state[0] for start, end in list_documents(cu)]
        torch.testing.assert_close(encode_past(lm, tokens, cu), torch.cat(alone), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["infonce", "bilinear", "cosine", "smooth_l1"])
@pytest.mark.parametrize("edges", [[0], [0, 1, 2, 3]])
def test_packs_without_anchors_give_exactly_zero(name, edges):
    lm = build().cuda()
    future, tokens = FutureLoss(lm, estimator_type=name, exclude_duplicates=True, exclude_neighbors=1), draw(edges[-1])
    hidden = future.encode(tokens, torch.tensor(edges))
    loss = future(hidden, tokens, torch.tensor(edges)) + future.next_token_loss(hidden, tokens, torch.tensor(edges))
    loss.backward()
    assert loss.item() == 0.0
