"""Which modules of a decoder layer add to the residual stream, for `training.dropout`: of layers written for the test, and of
flash-linear-attention's. tests/models/test_dropout.py has transformers' families."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flame.errors import UserError
from flame.models.causal_lm import build_on_meta, find_decoder_layers
from flame.models.dropout import add_dropout, find_stream_writers
from tests.support import fla_families
from tests.support.models import tiny_llama


@pytest.mark.slow
def test_fused_norms_of_flash_linear_attention_hide_what_is_added():
    """Their norms add to the stream themselves. Mamba-2 and RWKV-7 have layers that do more than add."""
    for name in fla_families.TOYS:
        for is_fused in (True, False):
            lm = build_on_meta(fla_families.build_toy(name, fuse_norm=is_fused), "cuda", "none")
            expected = [] if is_fused or name in ("mamba2", "rwkv7") else ["attn", "mlp"]
            assert [find_stream_writers(layer, 128) for layer in find_decoder_layers(lm)] == [expected] * 2, name


class Block(nn.Module):
    """Returns a tuple, as attention does."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.product = nn.Linear(width, width)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.product(states), None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.block, self.out = Block(), nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor | tuple[Tensor, None]:
        raise NotImplementedError


class Scaled(Layer):
    def forward(self, states, mask):
        states = states + 0.5 * self.block(self.norm(states))[0]
        rows = states.reshape(-1, 8)
        return (rows + self.out(self.after(rows))).reshape(states.shape), None


class Parallel(Layer):
    def forward(self, states, mask):
        normed = self.norm(states)
        return states + (self.block(normed)[0] + self.out(normed))


class NormedBefore(Layer):
    def forward(self, states, mask):
        return states + self.after(self.block(states, mask)[0])


class NormedTogether(Layer):
    """The first transformers: the norm is of the stream itself."""

    def forward(self, states, mask):
        return self.norm(states + self.block(states)[0])


class Gated(Layer):
    def forward(self, states, mask):
        return states + torch.sigmoid(self.out(states)) * self.block(self.norm(states))[0]


class Unnamed(Layer):
    """Adds something that no module returns."""

    def forward(self, states, mask):
        return states + self.block(states)[0] + states.tanh()


class Bent(Layer):
    """Changes what it adds."""

    def forward(self, states, mask):
        return states + self.block(states)[0].tanh()


class OwnWeights(Layer):
    def forward(self, states, mask):
        return states + self.gain * self.block(states)[0]


class LooksInside(Layer):
    def forward(self, states, mask):
        return states + self.block.product(states)


@pytest.mark.parametrize(
    ("kind", "writers"),
    [
        (Scaled, ["block", "out"]),
        (Parallel, ["block", "out"]),
        (NormedBefore, ["after"]),
        *((kind, []) for kind in (NormedTogether, Gated, Unnamed, Bent, OwnWeights, LooksInside)),
    ],
)
def test_a_layer_is_understood_or_not_at_all(kind, writers):
    with torch.device("meta"):
        layer = kind()
    before = dict(layer._modules)
    assert find_stream_writers(layer, 8) == writers
    assert layer._modules == before


def test_a_model_whose_layers_are_not_understood_is_rejected_in_a_line():
    lm = build_on_meta(tiny_llama(), "cpu", "sdpa")
    lm.base_model.layers[1] = Gated()
    with pytest.raises(UserError, match=r'training.dropout = 0.3 is not supported with model_type "llama": .* layer 1 .* to 0$'):
        add_dropout(lm, 0.3)
    assert not any(module._forward_hooks for module in lm.modules())
