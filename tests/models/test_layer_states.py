"""States after an early layer, against the library's own, in every layout of a pass, recomputed or compiled."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from flame.attention import backends
from flame.attention.backends import MaskedBackend, VarlenBackend
from flame.attention.families import find_limits
from flame.models.causal_lm import build_on_meta, find_decoder_layers, initialize
from flame.models.layer_states import choose_shallow_depth, read_layer
from flame.models.parallelize import _checkpoint_activations
from tests.support.models import CPU, random_batch, random_cu_seqlens, tiny_llama


def build(attention: str = "sdpa", **changes):
    model = build_on_meta(tiny_llama(num_hidden_layers=3, **changes), "cpu", attention)
    initialize(model, CPU, seed=0)
    return model


def encode_alone(model, batch, depth: int) -> list[torch.Tensor]:
    """States after some layers, each document by itself, from the library's list of all."""
    found = []
    for a, b in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        outputs = model.base_model(batch.input_ids[:, a:b], output_hidden_states=True, use_cache=False)
        found.append(outputs.hidden_states[depth][0])
    return found


@pytest.mark.parametrize("in_rows", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_it_is_what_the_library_says_document_by_document(in_rows, depth):
    model, batch = build(), random_batch(random_cu_seqlens(30, 5, seed=3))
    backend = MaskedBackend("sdpa", find_limits(model.config), row_width=32)
    with patch.object(backends, "is_cheaper_in_rows", return_value=in_rows), read_layer(model, depth) as layer:
        backend.encode_past(model, batch)
        states = backend.flatten(layer.take(), batch)
    assert states.requires_grad, "whoever takes labels from it detaches them"
    torch.testing.assert_close(states, torch.cat(encode_alone(model, batch, depth)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ahead", [False, True])
def test_flash_attention_lays_it_out_the_same(ahead):
    """Its anti-causal pass reads backwards."""
    masked, varlen, batch = build(), build("varlen"), random_batch(random_cu_seqlens(30, 5, seed=3))
    varlen.load_state_dict(masked.state_dict())
    found = []
    for model, backend in ((masked, MaskedBackend("sdpa", find_limits(masked.config))), (varlen, VarlenBackend(30, 8))):
        with read_layer(model, 2) as layer, torch.no_grad():
            backend.encode_future(model, batch, 0) if ahead else backend.encode_past(model, batch)
            found.append(backend.flatten(layer.take(), batch, ahead=ahead))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_recomputed_layer_is_read_once_and_nothing_is_kept():
    model, batch = build(), random_batch(random_cu_seqlens(30, 5, seed=3))
    backend = MaskedBackend("sdpa", find_limits(model.config))
    with read_layer(model, 1) as plain:
        backend.encode_past(model, batch)
        expected = plain.take()
    again = build()
    _checkpoint_activations(find_decoder_layers(again), "full")
    with read_layer(again, 1) as layer:
        final = backend.encode_past(again, batch)
        states = layer.take()
        final.sum().backward()
        with pytest.raises(RuntimeError, match="has not run"):
            layer.take()
    assert torch.equal(states, expected)
    backend.encode_past(again, batch)
    with read_layer(again, 1) as layer, pytest.raises(RuntimeError):  # the pass before was not read
        layer.take()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_of_an_early_layer_s_states_are_those_without_recomputation(mode):
    batch, gradients = random_batch(random_cu_seqlens(30, 5, seed=3)), []
    backend = MaskedBackend("sdpa", find_limits(tiny_llama()))
    for recompute in ("none", mode):
        model = build()
        if recompute != "none":
            _checkpoint_activations(find_decoder_layers(model), recompute)
        with read_layer(model, 1) as layer:
            final = backend.encode_past(model, batch)
            states = layer.take()
        (final.square().sum() + states.sin().sum()).backward()
        gradients.append([parameter.grad for parameter in model.base_model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_compiled_layers_are_compiled_once():
    from torch._dynamo.testing import CompileCounter

    model, batch = build(), random_batch(random_cu_seqlens(30, 5, seed=3))
    backend, counter = MaskedBackend("sdpa", find_limits(model.config)), CompileCounter()
    for layer in find_decoder_layers(model):
        layer.compile(backend=counter, dynamic=False)
    found = []
    for turn in range(4):
        with read_layer(model, 1) as layer:
            backend.encode_past(model, batch)
            found.append(layer.take())
        if turn == 0:
            first = counter.frame_count
    assert counter.frame_count == first and all(torch.equal(states, found[0]) for states in found)


def test_a_share_of_the_depth():
    assert [choose_shallow_depth(layers, 0.2) for layers in (1, 2, 12, 20, 32)] == [1, 1, 2, 4, 6]
