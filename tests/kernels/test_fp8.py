"""8-bit products against their definition. Training uses them on GPUs alone; the arithmetic is the same here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flame.errors import UserError
from flame.kernels import fp8
from flame.kernels.fp8 import LARGEST, install_fp8, multiply_fp8, quantize_rows
from flame.objectives.future import objective as future
from flame.objectives.step import Requested, compute_losses
from tests.support.models import build_unsharded, future_config, random_batch, random_cu_seqlens


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_rows_are_scaled_to_the_range(scale):
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).bfloat16() * scale
    x[3] = 0
    rounded, factor = quantize_rows(x)
    restored = rounded.float() * factor
    assert restored.isfinite().all() and not restored[3].any()
    assert rounded.float().abs().amax() == LARGEST
    # e4m3 has 3 bits after the leading one: half a step is 1/16; below 2^-6 the steps stop shrinking
    bound = (x.float().abs() / 16).clamp(min=0.5 * 2**-9 * factor.max().item() * 1.01)
    assert ((restored - x.float()).abs() <= bound).all()


@pytest.mark.parametrize("bias", [False, True])
def test_product(bias):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 5, 64, generator=generator).bfloat16(), torch.randn(48, 64, generator=generator).bfloat16()
    b = torch.randn(48, generator=generator).bfloat16() if bias else None
    (xq, xs), (wq, ws) = quantize_rows(x.reshape(-1, 64)), quantize_rows(w)
    expected = ((xq.double() * xs.double()) @ (wq.double() * ws.double()).T).reshape(2, 5, 48)
    expected = expected if b is None else expected + b.double()
    found = multiply_fp8(x, w, b).double()
    assert (found - expected).norm() / expected.norm() < 5e-3  # rounding to bfloat16
    assert (found - (nn.functional.linear(x, w, b)).double()).norm() / expected.norm() < 6e-2


def test_layers_that_cannot_are_refused():
    """GPT-2's are no linear layers, others may have odd sizes: a run must not be called fp8 and be bf16."""
    with pytest.raises(UserError, match=r'future_encoder\.precision = "fp8".*multiples of 16'):
        install_fp8(nn.ModuleList([nn.Linear(24, 20), Conv1D(32, 32)]))


def test_the_switch():
    """Only layers whose sizes the products allow, only while it is on, and off again after an error."""
    layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 24), nn.LayerNorm(24))]).bfloat16()
    x = torch.randn(3, 32).bfloat16()
    with torch.no_grad():
        exact = layers[0](x)
        switch = install_fp8(layers)
        assert torch.equal(layers[0](x), exact)
        first = layers[0][0](x)
        with switch.on():
            assert not torch.equal(layers[0][0](x), first)
            torch.testing.assert_close(layers[0][0](x), first, rtol=0.2, atol=0.2)
            hidden = torch.randn(3, 48).bfloat16()
            assert torch.equal(layers[0][2](hidden), nn.functional.linear(hidden, layers[0][2].weight, layers[0][2].bias))
        with pytest.raises(ZeroDivisionError), switch.on():
            raise ZeroDivisionError
        assert torch.equal(layers[0](x), exact)


def test_only_the_anti_causal_pass_is_rounded(monkeypatch):
    calls = []

    def multiply(x, weight, bias):
        calls.append(x.shape)
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(fp8, "multiply_fp8", multiply)
    monkeypatch.setattr(future, "check_fp8", lambda device_type: None)
    model = build_unsharded(future_config(precision="fp8"))
    batch = random_batch(random_cu_seqlens(20, 3, seed=0))
    with torch.no_grad():  # as in validation
        model.encode_past(batch)
    assert not calls
    model(compute_losses, batch, Requested(aux=True)).ce_sum.backward()
    assert len(calls) == 2 * 7  # layers times their matrices, in one pass
