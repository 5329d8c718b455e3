"""The two passes of a model that is loaded already, against the model's own forward and against changed tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import flame
from flame import UserError, check_leaks, encode_future, encode_past
from flame.attention.families import FAMILIES
from flame.library.packs import read_pack
from flame.library.passes import choose, run_pass
from tests.support.families import TOYS, build_toy
from tests.support.library import CU, VOCAB, Deaf, build, draw, list_documents, small

# ---------------------------------------------------------------- what they compute


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TOYS)
@torch.no_grad()
def test_the_causal_pass_is_the_models_own_of_each_document(name, attention):
    if attention == "sdpa" and FAMILIES[TOYS[name][0]].has_sinks:
        pytest.skip("transformers' own SDPA has no sinks")
    lm, tokens = build(name, attention), draw()
    own = lm.config._attn_implementation
    alone = [lm.base_model(tokens[None, start:end]).last_hidden_state[0] for start, end in list_documents(CU)]
    torch.testing.assert_close(encode_past(lm, tokens, CU), torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert lm.config._attn_implementation == own


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("name", TOYS)
@torch.no_grad()
def test_one_changed_token_is_seen_on_its_side_of_its_document_alone(name, window):
    lm, tokens = build(name, "eager"), draw()
    before = encode_past(lm, tokens, CU), encode_future(lm, tokens, CU, window)
    for start, end in list_documents(CU):
        place = (start + end) // 2
        other = tokens.index_fill(0, torch.tensor([place]), int(tokens[place] + 1) % VOCAB)
        after = encode_past(lm, other, CU), encode_future(lm, other, CU, window)
        past, future = ((a != b).any(-1).nonzero().flatten().tolist() for a, b in zip(before, after, strict=True))
        assert set(past) <= set(range(place, end)) and place in past
        assert set(future) <= set(range(start, place + 1)) and place in future
        if not window and place > start:
            assert place - 1 in future


@torch.no_grad()
def test_the_anti_causal_pass_attends_strictly_ahead():
    """The same forward under the dense boolean mask, which the definition is."""
    lm, tokens = build(), draw()
    pack = read_pack(tokens, CU, torch.device("cpu"), VOCAB)
    index, segments = torch.arange(30), pack.segment_ids[0]
    for window in (0, 1, 3):
        ahead = index[None, :] - index[:, None]
        mask = (segments[:, None] == segments[None, :]) & (ahead > 0) & ((ahead <= window) | (window == 0))
        states = lm.base_model(tokens[None], attention_mask=mask[None, None], position_ids=pack.position_ids).last_hidden_state
        torch.testing.assert_close(encode_future(lm, tokens, CU, window), states[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_window_is_written_in_three_ways():
    lm, tokens = build(), draw()
    expected = encode_future(lm, tokens, CU)
    assert all(torch.equal(encode_future(lm, tokens, CU, window), expected) for window in (0, None, -1))
    with pytest.raises(ValueError, match="window_k = -3"):
        encode_future(lm, tokens, CU, -3)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([torch.int32, torch.int64]), st.booleans())
@torch.no_grad()
def test_any_documents_any_shape_of_input(lengths, dtype, is_flat):
    lm = build()
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)
    tokens = draw(sum(lengths))
    alone = [lm.base_model(tokens[None, start:end]).last_hidden_state[0] for start, end in list_documents(cu)]
    found = encode_past(lm, tokens.to(dtype) if is_flat else tokens[None], cu if is_flat else cu[None])
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert encode_future(lm, tokens, cu).shape == found.shape


@torch.no_grad()
def test_repeated_boundaries_are_empty_documents():
    lm, tokens = build(), draw()
    filled = torch.tensor([0, 0, 9, 10, 10, 24, 30, 30, 30])
    assert torch.equal(encode_past(lm, tokens, filled), encode_past(lm, tokens, CU))
    assert torch.equal(encode_future(lm, tokens, filled), encode_future(lm, tokens, CU))


def test_an_empty_pack_has_no_states():
    lm = build()
    states = encode_past(lm, draw(0), torch.tensor([0]))
    states.sum().backward()
    assert states.shape == (0, 32) and encode_future(lm, draw(0), torch.tensor([0])).shape == (0, 32)


@torch.no_grad()
def test_the_flash_path_is_the_masked_one():
    """By its definition on the CPU, in float64 where it is exact; under autocast rotary embeddings hand it float32."""
    lm, tokens = build(attention="eager", dtype=torch.float64), draw()
    pack = read_pack(tokens, CU, torch.device("cpu"), VOCAB)
    for direction in ("causal", "future"):
        masked, flash = (run_pass(lm, pack, direction, 0, attention) for attention in ("sdpa", "varlen"))
        torch.testing.assert_close(flash, masked, rtol=1e-9, atol=1e-9)
    lm = lm.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masked, flash = (run_pass(lm, pack, "causal", 0, attention) for attention in ("sdpa", "varlen"))
    assert (masked.float() - flash.float()).norm() < 0.05 * masked.float().norm()
    assert lm.config._attn_implementation == "eager"


# ---------------------------------------------------------------- the model stays as it was


def test_summaries_are_not_random_and_carry_no_gradient():
    lm, tokens = build("gpt2", "eager", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5), draw()
    expected = encode_future(lm, tokens, CU)
    lm.train()
    lm.transformer.h[0].eval()
    found = encode_future(lm, tokens, CU)
    assert torch.equal(found, expected) and not found.requires_grad
    assert lm.training and lm.transformer.h[1].training and not lm.transformer.h[0].training
    assert not torch.equal(encode_past(lm, tokens, CU), encode_past(lm, tokens, CU))  # the causal pass drops, as training does


def test_the_attention_comes_back_after_an_error():
    lm, tokens = build(attention="eager"), draw()

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    hook = lm.model.layers[1].register_forward_hook(fail)
    lm.train()
    with pytest.raises(RuntimeError, match="in the middle"):
        encode_future(lm, tokens, CU)
    hook.remove()
    assert lm.config._attn_implementation == "eager" and all(module.training for module in lm.modules())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_recomputes_under_the_same_attention(attention, use_reentrant):
    lm, tokens = build(attention=attention).train(), draw()
    plain = copy.deepcopy(lm)
    lm.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    lm.enable_input_require_grads()
    functions = [layer._gradient_checkpointing_func for layer in lm.model.layers]
    for model in (plain, lm):
        encode_past(model, tokens, CU).square().sum().backward()
    for (name, parameter), reference in zip(lm.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert [layer._gradient_checkpointing_func for layer in lm.model.layers] == functions
    assert lm.config._attn_implementation == attention


def test_gradients_are_autograds_of_the_documents_alone():
    lm, tokens = build("llama, untied head, biases", "eager"), draw()
    weight = torch.randn(30, 32)
    packed = torch.autograd.grad((encode_past(lm, tokens, CU) * weight).sum(), list(lm.model.parameters()))
    alone = torch.cat([lm.model(tokens[None, start:end]).last_hidden_state[0] for start, end in list_documents(CU)])
    expected = torch.autograd.grad((alone * weight).sum(), list(lm.model.parameters()))
    for ours, theirs in zip(packed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_adapters_and_compiled_wrappers_are_seen_through():
    peft = pytest.importorskip("peft")
    lm, tokens = build(), draw()
    before = encode_future(lm, tokens, CU)
    assert torch.equal(encode_future(torch.compile(lm), tokens, CU), before)
    adapted = peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert not torch.equal(encode_future(adapted, tokens, CU), before)
    prompted = peft.get_peft_model(build(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match="virtual tokens"):
        encode_past(prompted, tokens, CU)


# ---------------------------------------------------------------- what is refused

WRONG_PACKS = {
    "too short": (draw(), [0, 29], "cu_seqlens ends with 29, but input_ids holds 30 tokens"),
    "too long": (draw(), [0, 31], "cu_seqlens ends with 31, but input_ids holds 30 tokens"),
    "falling": (draw(), [0, 20, 10, 30], "cu_seqlens must not fall"),
    "begins later": (draw(), [1, 30], "cu_seqlens must begin with 0"),
    "nothing": (draw(), [], "cu_seqlens must begin with 0"),
    "a batch": (draw().view(2, 15), [0, 30], r"input_ids must have the shape \[T\] or \[1, T\], not \[2, 15\]"),
    "floats": (draw().float(), [0, 30], "input_ids must hold integers"),
    "unknown tokens": (draw() + 40, [0, 30], "the model knows 0 to 60"),
    "negative tokens": (draw() - 1, [0, 30], "the model knows 0 to 60"),
    "a long document": (
        draw(300),
        [0, 300],
        "the longest document has 300 tokens, more than the model's max_position_embeddings",
    ),
}


@pytest.mark.parametrize("case", WRONG_PACKS)
def test_a_wrong_pack_is_a_value_error(case):
    tokens, edges, message = WRONG_PACKS[case]
    for encode in (encode_past, encode_future):
        with pytest.raises(ValueError, match=message):
            encode(build(), tokens, torch.tensor(edges, dtype=torch.long))


def test_cu_seqlens_must_be_a_tensor_of_integers():
    for cu in ([0, 30], CU.float()):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            encode_past(build(), draw(), cu)


def test_models_that_cannot_be_run_are_one_line():
    tokens = draw()
    with torch.device("meta"):
        on_meta = build()
    sharded = build()
    sharded.model.layers[0] = type("FullyShardedDataParallel", (torch.nn.Module,), {})()
    cases: list[tuple[torch.nn.Module, str]] = [
        (torch.nn.Linear(2, 2), "Linear is no model of transformers"),
        (on_meta, "must be whole on one device"),
        (sharded, "sharded"),
        (build().model, "names no model without head"),
        (build("llama", attn_logit_softcapping=50.0), "attn_logit_softcapping = 50.0 is not supported"),
        (AutoModelForCausalLM.from_config(small("cwm")), 'model_type "cwm" is not supported with sliding_window'),
        (AutoModelForCausalLM.from_config(small("mamba")), "mamba|layers of type"),
    ]
    for model, message in cases:
        with pytest.raises(UserError, match=message) as error:
            encode_past(model, tokens, CU)
        assert all("\n" not in line for line in error.value.lines)


# ---------------------------------------------------------------- families that no test vouches for


def test_an_unknown_family_may_be_used_after_it_passed():
    torch.manual_seed(0)
    lm, tokens = AutoModelForCausalLM.from_config(small("stablelm", use_cache=False)), draw()
    with pytest.raises(UserError, match=r"call flame.check_leaks\(model\) once"):
        encode_past(lm, tokens, CU)
    report = check_leaks(lm)
    assert not report.has_leak and report.has_plain_head and "no leak" in report.verdict
    alone = [lm.base_model(tokens[None, start:end]).last_hidden_state[0] for start, end in list_documents(CU)]
    torch.testing.assert_close(encode_past(lm, tokens, CU), torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_model_that_leaks_is_refused():
    torch.manual_seed(0)
    lm = Deaf(build_toy("llama"))
    weights, state = copy.deepcopy(lm.state_dict()), torch.get_rng_state()
    report = check_leaks(lm)
    assert report.has_leak and report.verdict.startswith("LEAK")
    assert all(torch.equal(value, weights[name]) for name, value in lm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match="Deaf is none of the models that the tests cover"):
        encode_past(lm, draw(), CU)
    with pytest.raises(UserError, match="cannot be used: LEAK"):
        flame.FutureLoss(lm)


def test_a_pack_too_short_for_flex_attention_takes_sdpa():
    lm = build()
    assert choose(lm, 30) == "sdpa" == choose(lm, 1000)  # on CPUs always
