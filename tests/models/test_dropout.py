"""`training.dropout`: what it is, in which passes it acts, and that masks depend on nothing but the seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from flame.attention.backends import build_backend
from flame.models.causal_lm import build_on_meta, find_decoder_layers, initialize
from flame.models.dropout import add_dropout, find_stream_writers
from flame.models.head_check import check_head
from flame.models.leak_check import check_no_leak
from flame.models.parallelize import _checkpoint_activations
from flame.models.wrapper import TrainingModel
from flame.objectives.probe import measure_step
from flame.objectives.registry import BUILT_IN
from flame.objectives.step import Requested, compute_losses
from tests.support.families import OTHERS, TOYS, build_other, build_toy, list_paths
from tests.support.models import CPU, get_own, random_batch, random_cu_seqlens, tiny_llama
from tests.support.objectives import OPTIONS, build_objective

P = 0.3
SITES = 1 + 2 * 2
"""The embeddings, and two blocks in each of two layers."""


def build(recompute: str = "none", *, probability: float = P, config: PretrainedConfig | None = None) -> TrainingModel:
    """A language model with dropout in float64."""
    lm = build_on_meta(config or tiny_llama(), "cpu", "sdpa")
    if probability:
        add_dropout(lm, probability)
    _checkpoint_activations(find_decoder_layers(lm), recompute)
    initialize(lm, CPU, seed=0)
    model = TrainingModel(lm.double(), build_backend("sdpa", lm.config, 64, is_compiled=True))
    model.has_dropout = bool(probability)
    return model


def add_to(model: TrainingModel) -> TrainingModel:
    add_dropout(model.lm, P)
    model.has_dropout = True
    return model


def differentiate(model: TrainingModel, seed: int = 0) -> list[Tensor]:
    """States and gradients of a causal pass."""
    torch.manual_seed(seed)
    states = model.encode_past(random_batch(random_cu_seqlens(24, 4, seed=3)))
    gradients = torch.autograd.grad(states.sin().sum(), list(model.lm.base_model.parameters()))
    return [states.detach(), *gradients]


@contextmanager
def counting() -> Iterator[list[float]]:
    """The probabilities of all dropout that happens inside."""
    found, own = [], F.dropout

    def drop(states: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if training and p:
            found.append(p)
        return own(states, p, training, inplace)

    with patch.object(F, "dropout", drop):
        yield found


# ---------------------------------------------------------------- what it is


def test_states_and_gradients_are_those_of_a_plain_loop():
    """Llama written out, with torch's dropout at its five sites, and the same generator."""
    model, batch = build(), random_batch(torch.tensor([0, 24], dtype=torch.int32))
    plain = build(probability=0.0).lm.base_model

    torch.manual_seed(5)
    found = model.encode_past(batch)
    torch.manual_seed(5)
    states = F.dropout(plain.embed_tokens(batch.input_ids), P)
    rotary = plain.rotary_emb(states, batch.position_ids)
    mask = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
    for layer in plain.layers:
        attended, _ = layer.self_attn(layer.input_layernorm(states), position_embeddings=rotary, attention_mask=mask)
        states = states + F.dropout(attended, P)
        states = states + F.dropout(layer.mlp(layer.post_attention_layernorm(states)), P)
    expected = plain.norm(states)[0]
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(s.sin().sum(), list(m.parameters())) for s, m in ((found, model.lm.base_model), (expected, plain))
    ]
    torch.testing.assert_close(*gradients)


AFTER_NORMS = ["post_attention_layernorm", "post_feedforward_layernorm"]
WRITERS = {
    **dict.fromkeys(["olmo2", "olmo3", "gemma2", "gemma3", "gemma3, capped logits", "exaone4"], AFTER_NORMS),
    "glm4": ["post_self_attn_layernorm", "post_mlp_layernorm"],
    "hyperclovax": ["post_norm1", "post_norm2"],
    "gpt_neox": ["post_attention_dropout", "post_mlp_dropout"],
    "phi3": ["resid_attn_dropout", "resid_mlp_dropout"],
    "phi": ["resid_dropout"],
    **{name: ["attn", "mlp"] for name in ("gpt2", "gptj", "codegen")},
    **{name: ["self_attn", "dropout"] for name in ("persimmon", "stablelm")},
}
"""Where they are not attention and MLP themselves: norms after the blocks, and the families' own dropout, which is 0."""


@pytest.mark.parametrize("name", [*TOYS, *OTHERS])
def test_what_each_family_adds_to_its_stream_is_found(name):
    """With all of it dropped, each layer of the real pass returns its input."""
    config = build_toy(name) if name in TOYS else build_other(name)
    attention = list_paths(name)[0] if name in TOYS else "sdpa"
    lm = build_on_meta(config, "cpu", attention)
    add_dropout(lm, P)
    layers = find_decoder_layers(lm)
    for layer in layers:
        assert find_stream_writers(layer, config.hidden_size) == WRITERS.get(name, ["self_attn", "mlp"])
    if name in ("gptj", "codegen"):  # whose pass the trainer rejects
        return
    initialize(lm, CPU, seed=0)
    streams = []
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: streams.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        layer.register_forward_hook(lambda _, args, output: streams.append(output[0] if isinstance(output, tuple) else output))
    drops = iter(lambda: len(streams), None)  # nothing has run before the embeddings
    with patch.object(F, "dropout", lambda states, *_, **__: states if next(drops) == 0 else states * 0.0):
        TrainingModel(lm, build_backend(attention, config, 64)).encode_past(random_batch(random_cu_seqlens(24, 4, seed=3)))
    assert len(streams) == 4 and streams[0].any()
    assert all(torch.equal(stream, streams[0]) for stream in streams)


# ---------------------------------------------------------------- where it acts

TARGETS = ("causal", "mean_embedding", "random", "ema", "shuffled")
VARIANTS = {
    **{name: (name, {}) for name in sorted({*OPTIONS, *BUILT_IN})},
    **{
        f"future, {target}": ("future", {"target": target})
        for target in ("causal", "mean_embedding", "random", "ema", "shuffled")
    },
    "future, global": ("future", {"negatives": "global"}),
    "fsp_revlm, trained": ("fsp_revlm", {"train_reverse": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_of_every_objective_are_made_without_it(variant, one_process):
    """It acts at the five sites of the one causal pass, and diagnostics of gradients run two."""
    name, changes = VARIANTS[variant]
    model = add_to(build_objective(name, **changes))
    objective, batch = get_own(model), random_batch(random_cu_seqlens(40, 5, seed=2))
    with counting() as found:
        (prepared,) = objective.prepare_step(model, [batch])
        with torch.no_grad():
            objective.prepare(model, batch, prepared)
        assert not found
        model(compute_losses, batch, Requested(aux=True), prepared)
        assert found == [P] * SITES
        found.clear()
        measure_step(model, batch, 42, 0.5, prepared)
        assert found == [P] * SITES * 2


def test_it_acts_neither_in_evaluation_mode_nor_without_gradient():
    model, plain = build(), build(probability=0.0)
    batch, expected = random_batch(random_cu_seqlens(24, 4, seed=3)), differentiate(plain)[0]
    with torch.no_grad():
        assert torch.equal(model.encode_past(batch), expected)
        assert torch.equal(model.encode_future(batch), plain.encode_future(batch))
        assert torch.equal(model.encode_privileged(batch, "one_ahead"), plain.encode_privileged(batch, "one_ahead"))
    assert torch.equal(model.encode_privileged(batch, "one_ahead"), plain.encode_privileged(batch, "one_ahead"))
    model.eval()
    assert torch.equal(differentiate(model)[0], expected)
    model.train()
    assert not torch.equal(differentiate(model)[0], expected)


def test_checks_at_the_start_run_without_it():
    model = add_to(build_objective("future"))
    with counting() as found:
        check_head(model, CPU)
        check_no_leak(model, CPU, True)
    assert not found


def test_a_summary_with_gradient_is_not_computed_with_it():
    """Another network has none; nor is there any in evaluation mode."""
    model, batch = build(), random_batch(random_cu_seqlens(24, 4, seed=3))
    other = build(probability=0.0).lm
    for encode in (model.encode_future, lambda each: model.encode_reversed(model.lm, each)):
        with pytest.raises(RuntimeError, match=r"training\.dropout would act in a pass"):
            encode(batch)
    assert model.encode_future(batch, network=other).requires_grad
    assert model.encode_reversed(other, batch).requires_grad
    assert model.eval().encode_future(batch).requires_grad


# ---------------------------------------------------------------- the same masks


def test_masks_depend_on_the_seed_alone():
    model = build()
    first, again, other = differentiate(model), differentiate(model), differentiate(model, seed=1)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize("mode", ["full", "selective", "pointwise"])
def test_what_is_recomputed_has_the_same_masks(mode):
    assert all(map(torch.equal, differentiate(build()), differentiate(build(mode))))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full", "pointwise"])
def test_compiled_layers_have_the_same_masks(mode):
    """And the anti-causal pass none. Later steps compile nothing."""
    model, expected = build(mode), differentiate(build())
    batch = random_batch(random_cu_seqlens(24, 4, seed=3))
    for layer in find_decoder_layers(model.lm):
        layer.compile(dynamic=False, backend="aot_eager")
    torch.testing.assert_close(differentiate(model), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_future(batch), build(probability=0.0).encode_future(batch))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert not torch.equal(differentiate(model, seed=1)[0], expected[0])
        with torch.no_grad():
            model.encode_future(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["none", "full", "pointwise"])
def test_the_backward_has_the_masks_of_the_forward(mode, compiled):
    """The loss is linear in the last matrix, so its gradient times the matrix is the part of the loss that comes from it. In
    compiled layers the compiler's own code draws the masks."""
    torch.compiler.reset()
    shape = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    lm = build_on_meta(tiny_llama(**shape), "cuda", "flex")
    add_dropout(lm, P)
    layers = find_decoder_layers(lm)
    _checkpoint_activations(layers, mode)
    initialize(lm, torch.device("cuda"), seed=0)
    for layer in layers if compiled else ():
        layer.compile(dynamic=False)
    lm.base_model.norm = nn.Identity()
    model = TrainingModel(lm, build_backend("flex", lm.config, 256, compiled))
    batch = random_batch(random_cu_seqlens(256, 4, seed=3)).to("cuda")
    direction = torch.randn(256, 128, generator=torch.Generator().manual_seed(1)).cuda()
    (matrix,) = (each for name, each in lm.named_parameters() if "layers.1." in name and "down_proj" in name)

    def run() -> Tensor:
        torch.manual_seed(0)
        return (model.encode_past(batch) * direction).double().sum()

    loss = run()
    (gradient,) = torch.autograd.grad(loss, matrix)
    assert run() == loss
    part = (gradient * matrix).double().sum()
    with torch.no_grad():
        matrix.zero_()
    torch.testing.assert_close(part, loss - run(), rtol=1e-3, atol=1e-3)
