"""activation_checkpoint.mode = "pointwise": less is kept for the backward; neither attention nor a product is computed twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flame.attention import varlen
from flame.models import parallelize

WIDTH, HEADS, LENGTH = 32, 4, 96


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = (nn.Linear(WIDTH, size, bias=False) for size in (3 * WIDTH, WIDTH))
        self.gate, self.up, self.down = (nn.Linear(*sizes, bias=False) for sizes in ((WIDTH, 128), (WIDTH, 128), (128, WIDTH)))

    def forward(self, states: Tensor, cu_seqlens: Tensor) -> Tensor:
        parts = self.qkv(nn.functional.rms_norm(states, [WIDTH])).view(LENGTH, 3, HEADS, -1).unbind(1)
        states = states + self.out(varlen.varlen_attention(*parts, cu_seqlens, LENGTH, -1, 0.3)[0].reshape(LENGTH, WIDTH))
        normed = nn.functional.rms_norm(states, [WIDTH])
        return states + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


def run(mode: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int, list[Tensor]]:
    """Bytes kept for the backward, FLOPs of products, times that scores were computed, and gradients."""
    torch.manual_seed(0)
    torch.compiler.reset()
    scored, real = [], varlen._score_all
    monkeypatch.setattr(varlen, "_score_all", lambda *args: scored.append(1) or real(*args))
    layers, states, kept = nn.ModuleList([Layer()]), torch.randn(LENGTH, WIDTH, requires_grad=True), {}
    parallelize._checkpoint_activations(layers, mode)
    if is_compiled:
        layers[0].compile(dynamic=False, backend="aot_eager_decomp_partition")

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = layers[0](states, torch.tensor([0, 40, LENGTH], dtype=torch.int32))
        out.square().sum().backward()
    parameters = list(layers.parameters())
    given = {tensor.untyped_storage().data_ptr() for tensor in (*parameters, states, out)}
    size = sum(size for pointer, size in kept.items() if pointer not in given)
    return size, counter.get_total_flops(), len(scored), [p.grad for p in parameters if p.grad is not None]


def test_less_is_kept_and_nothing_costly_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, flops, scored, expected = run("none", True, monkeypatch)
    less, flops_again, scored_again, found = run("pointwise", True, monkeypatch)
    assert less < 0.8 * whole
    assert flops_again == flops and scored_again == scored == 2, "in the forward and in the backward"
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert run("full", True, monkeypatch)[1] > flops


def test_without_compilation_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, flops, scored, expected = run("none", False, monkeypatch)
    _, flops_again, scored_again, found = run("pointwise", False, monkeypatch)
    assert flops_again == flops and scored_again == scored == 2
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
