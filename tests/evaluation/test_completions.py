"""Completions of prompts that are packed together, against one prompt at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flame.data.tokenizer import build_bytes_tokenizer
from flame.evaluation.completions import Completer, _predict, read_prompts
from flame.evaluation.scoring import build_packed
from tests.support.evaluation import build_toy, never
from tests.support.models import CPU
from tests.support.ranks import run_on_ranks

SEQ_LEN, CONTEXT_LEN, NUM_TOKENS = 64, 24, 9
TOKENIZER = build_bytes_tokenizer()
PROMPTS = [b"alpha", b"", b"a", b"beta gamma delta epsilon zeta", b"12", b"\xc3\xa9t\xc3\xa9", b"zeta", b"b"]


def build_completer(rank: int = 0, world_size: int = 1, prompts=PROMPTS, **changes) -> Completer:
    ids = [np.asarray(list(prompt), dtype=np.int32) for prompt in prompts]
    return Completer(ids, NUM_TOKENS, TOKENIZER, SEQ_LEN, CONTEXT_LEN, rank, world_size, CPU, **changes)


@torch.no_grad()
def complete_plainly(lm, prompt: bytes, needed: int = NUM_TOKENS) -> list[int]:
    ids = (list(prompt) or [TOKENIZER.eos_token_id])[-(CONTEXT_LEN - needed + 1) :]
    start = len(ids)
    while len(ids) < min(start + NUM_TOKENS, CONTEXT_LEN + 1):
        ids.append(int(lm(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == TOKENIZER.eos_token_id:
            return ids[start:-1]
    return ids[start:]


@pytest.mark.usefixtures("one_process")
def test_greedy_completions_are_those_of_a_plain_loop():
    """One of them ends early: a model whose head is turned towards the end of text."""
    model, completer = build_toy(), build_completer()
    with torch.no_grad():
        model.lm.model.embed_tokens.weight[TOKENIZER.eos_token_id] *= 3
    found = completer.complete(model, never)
    assert found == [complete_plainly(model.lm, prompt) for prompt in PROMPTS]
    assert completer.num_cut == 1 and {len(ids) for ids in found} > {NUM_TOKENS}


@pytest.mark.usefixtures("one_process")
def test_a_prompt_loses_no_more_than_its_own_completion_needs():
    """And its completion goes on while there is room."""
    needed = [1, NUM_TOKENS, 4, 2, 1, 3, 1, 1]
    model, completer = build_toy(), build_completer(needed=needed)
    found = completer.complete(model, never)
    assert found == [complete_plainly(model.lm, prompt, count) for prompt, count in zip(PROMPTS, needed, strict=True)]
    assert completer.num_cut == 1 and len(found[3]) <= 2 and completer._prompts[3].tolist() == list(PROMPTS[3][-23:])


def test_in_half_precision_the_chosen_token_is_what_scoring_calls_greedy():
    """Logits of half precision have too many equals."""
    model = build_toy().to(torch.bfloat16)
    batch = build_packed([np.asarray([97, byte]) for byte in range(250)], 500, CONTEXT_LEN)
    with torch.no_grad():
        chosen = _predict(model, batch, 250).argmax(-1)
        states = model.encode_past(batch)[batch.cu_seqlens[1:251].long() - 1]
    assert model.output_head.score_labels(states, chosen).is_best.all()
    logits = model.output_head.compute_logits(states)
    assert ((logits == logits.amax(-1, keepdim=True)).sum(-1) > 1).any(), "else this tests nothing"


@pytest.mark.usefixtures("one_process")
def test_drawn_completions_depend_on_seed_and_prompt_alone():
    model = build_toy()
    before = torch.get_rng_state()
    found, again, other, alone = (
        build_completer(temperature=1.5, **changes).complete(model, never)
        for changes in ({}, {}, {"seed": 1}, {"prompts": PROMPTS[:2]})
    )
    assert found == again and alone == found[:2] and all(a != b for a, b in zip(found, other, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    cold = build_completer(temperature=1e-4).complete(model, never)
    assert cold == build_completer().complete(model, never) != found


@pytest.mark.usefixtures("one_process")
def test_tokens_are_drawn_by_their_probabilities():
    """The first token of many equal prompts, against the softmax of the logits."""
    model = build_toy()
    completer = Completer([np.asarray([97])] * 600, 1, TOKENIZER, 600, 24, 0, 1, CPU, temperature=2.0)
    drawn = [ids[0] if ids else TOKENIZER.eos_token_id for ids in completer.complete(model, never)]
    with torch.no_grad():
        expected = (model.lm(torch.tensor([[97]])).logits[0, -1] / 2).softmax(-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / len(drawn)
    assert (counts - expected).abs().max() < 0.06 and (counts > 0).sum() > 20


def complete_on_rank(_folder) -> list[list[int]]:
    import torch.distributed as dist

    return build_completer(dist.get_rank(), dist.get_world_size(), temperature=1.0).complete(build_toy(), never)


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_two_ranks_complete_as_one(tmp_path):
    first, second = run_on_ranks(2, tmp_path / "two", complete_on_rank)
    assert first == second == complete_on_rank(tmp_path)


@pytest.mark.usefixtures("one_process")
def test_a_request_to_stop_ends_it_before_the_next_token():
    asked = []
    assert build_completer().complete(build_toy(), lambda: bool(asked.append(0)) or len(asked) == 3) is None
    assert len(asked) == 3


def test_prompts_are_the_lines_that_are_not_empty(tmp_path):
    (tmp_path / "prompts.txt").write_text("alpha\n\n  beta \r\n été")
    prompts, ids = read_prompts(str(tmp_path / "prompts.txt"), TOKENIZER)
    assert prompts == ["alpha", "  beta ", " été"] and [bytes(each.tolist()).decode() for each in ids] == prompts
