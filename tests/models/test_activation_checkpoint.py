"""activation_checkpoint.mode = "pointwise": less is kept for the backward; neither attention nor a product is computed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from flame.attention import varlen
from flame.errors import UserError
from flame.models import parallelize
from flame.models.causal_lm import find_decoder_layers
from flame.models.memory_estimate import count_layer_kept, count_layer_saved
from flame.objectives.step import Requested, compute_losses
from flame.trainer.options import read_options
from tests.support.families import build_toy
from tests.support.models import build_unsharded, future_config, random_batch, random_cu_seqlens
from tests.support.runs import options

WIDTH, HEADS, LENGTH = 32, 4, 96
CU_SEQLENS = torch.tensor([0, 40, LENGTH], dtype=torch.int32)


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


def build(mode: str) -> nn.ModuleList:
    torch.manual_seed(0)
    layers = nn.ModuleList([Layer()])
    parallelize._checkpoint_activations(layers, mode)
    return layers


def list_gradients(layers: nn.ModuleList) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    layers[0](torch.randn(LENGTH, WIDTH, generator=generator), CU_SEQLENS).square().sum().backward()
    return [parameter.grad for parameter in layers.parameters() if parameter.grad is not None]


@dataclass
class Graphs:
    """What a compiler was given."""

    kept: int = 0
    """Numbers that go from the forward to the backward."""
    backward: Counter[object] = field(default_factory=Counter)
    """How often the backward has each operation."""

    def build_backend(self) -> Callable[..., Any]:
        compilers = {"fw_compiler": self.read_forward, "bw_compiler": self.read_backward}
        return aot_autograd(**compilers, partition_fn=min_cut_rematerialization_partition)

    def read_forward(self, graph: GraphModule, _: object) -> object:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        made = {node for node in output.args[0][1:] if node.op != "placeholder"}
        self.kept = sum(node.meta["val"].numel() for node in made if isinstance(node.meta.get("val"), Tensor))
        return make_boxed_func(graph.forward)

    def read_backward(self, graph: GraphModule, _: object) -> object:
        self.backward = Counter(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)


def compile_layer(mode: str) -> tuple[Graphs, list[Tensor]]:
    torch.compiler.reset()
    graphs, layers = Graphs(), build(mode)
    layers[0].compile(fullgraph=True, dynamic=False, backend=graphs.build_backend())
    return graphs, list_gradients(layers)


def test_less_is_kept_and_nothing_costly_is_computed_again() -> None:
    plain, expected = compile_layer("none")
    pointwise, found = compile_layer("pointwise")
    assert pointwise.kept < 0.8 * plain.kept
    for op in (torch.ops.aten.mm.default, torch.ops.flame.varlen_attention.default):
        assert pointwise.backward[op] == plain.backward[op]
    assert plain.backward[torch.ops.aten.mm.default] == 9, "two for each matrix, but for the first layer's input"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert compile_layer("full")[0].backward[torch.ops.flame.varlen_attention.default] == 1


@pytest.mark.parametrize("mode", ["none", "pointwise", "selective", "full"])
@pytest.mark.parametrize("name", ["llama", "llama, untied head, biases", "granite"])
def test_as_much_is_kept_as_the_estimate_says(name: str, mode: str) -> None:
    torch.compiler.reset()
    sizes = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = build_toy(name, **sizes, num_hidden_layers=1)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=varlen.IMPLEMENTATION)
    layers = find_decoder_layers(lm)
    expected = count_layer_kept(layers[0], config) if mode == "none" else count_layer_saved(layers[0], config, mode)
    parallelize._checkpoint_activations(layers, mode)
    graphs = Graphs()
    layers[0].compile(fullgraph=True, dynamic=False, backend=graphs.build_backend())
    states = torch.randn(1, LENGTH, 128, requires_grad=True)
    angles = torch.randn(2, 1, LENGTH, 64).unbind()
    out = layers[0](states, position_embeddings=angles, documents=varlen.DocumentLayout(CU_SEQLENS, LENGTH, False))
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    # Beside them: the layer's input, which no operation of its own makes. Not counted: a number or two for each norm and head.
    assert 128 + graphs.kept / LENGTH == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("name", "changes"), [("olmo", {"clip_qkv": 0.01}), ("mixtral", {}), ("qwen3_moe", {})])
def test_layers_that_change_products_in_place_have_the_right_gradients(name: str, changes: dict[str, object]) -> None:
    """Compiled. OLMo clips its queries in place, Mixtral divides the router's choice."""
    found = []
    for mode in ("none", "selective", "pointwise"):
        torch.compiler.reset()
        model = build_unsharded(future_config(), build_toy(name, num_hidden_layers=1, **changes))
        layers = find_decoder_layers(model.lm)
        parallelize._checkpoint_activations(layers, mode)
        layers[0].compile(dynamic=False, backend="aot_eager_decomp_partition")
        model(compute_losses, random_batch(random_cu_seqlens(64, 3, seed=1)), Requested(aux=False)).ce_sum.backward()
        found.append([parameter.grad for parameter in model.lm.parameters()])
    for plain, *recomputed in zip(*found, strict=True):
        for gradient in recomputed:
            torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["selective", "pointwise"])
def test_uncompiled_layers_are_refused(workspace: Path, tmp_path: Path, mode: str) -> None:
    """Such gradients would be wrong, in silence."""
    with pytest.raises(UserError) as refusal:
        read_options(options(workspace, tmp_path / "run", activation_checkpoint__mode=mode), 1)
    (line,) = refusal.value.lines
    assert line.startswith(f'activation_checkpoint.mode = "{mode}" beside training.compile = false')


@pytest.mark.parametrize(("mode", "is_equal"), [("pointwise", True), ("full", False)])
def test_without_compilation_too(mode: str, is_equal: bool) -> None:
    with FlopCounterMode(display=False) as plain:
        expected = list_gradients(build("none"))
    with FlopCounterMode(display=False) as counter:
        found = list_gradients(build(mode))
    assert (counter.get_total_flops() == plain.get_total_flops()) == is_equal
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
