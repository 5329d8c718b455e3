"""Estimates the peak memory of a rank on a GPU, from a model on the meta device.

What a decoder layer keeps from its forward to its backward is counted, per token, from its matrices: the compiler keeps the
inputs and outputs of matrix products and the residual stream, and recomputes what lies between. What `activation_checkpoint.mode`
leaves of it follows from the operations that `flame.models.parallelize` saves. docs/performance.md compares the estimate with
measured peaks (`python -m benchmarks.memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from flame.attention.backends import find_head_dims, is_recurrent
from flame.config.training import Training
from flame.kernels.softmax_rows import CHUNK_BYTES
from flame.models.causal_lm import find_decoder_layers
from flame.models.wrapper import TrainingModel

HALF, FULL = 2, 4
"""Bytes of a number in bfloat16 and float32."""
GATHERED_LAYERS = 2
"""Layers whose whole weights are there at once: the one that is computed and the next."""
EAGER = 1.45
"""Times as much is kept without training.compile: each operation keeps its own input, norms in float32. Fitted to one run."""
AFTER_LAYERS = 2
"""Vectors of the model's width that are kept beside those of the layers: the stream after the last one, and its norm."""


class Memory(NamedTuple):
    """Bytes of one rank."""

    weights: float
    gradients: float
    moments: float
    gathered: float
    """Weights in the compute dtype, gathered from all ranks."""
    activations: float
    """From forward to backward."""
    recomputed: float
    """What one layer computes again in the backward."""
    logits: float
    """A chunk of them."""
    head_gradients: float
    """Of the output embedding and of the last hidden states."""
    objective: float
    """What the objective keeps beside its weights."""
    layer_gradients: float
    """Of the layers that are computed, before they are summed over ranks."""

    @property
    def at_loss(self) -> float:
        """When the cross entropy is computed: all activations are there."""
        return self._held + self.logits

    @property
    def at_layer(self) -> float:
        """When the backward of the last layer begins: the logits are gone, and what the layer has not kept is there again."""
        return self._held + self.recomputed

    @property
    def _held(self) -> float:
        return self.weights + self.moments + self.gathered + self.activations + self.head_gradients + self.objective

    @property
    def at_end(self) -> float:
        """When the backward ends: all gradients are there, and no activations."""
        return self.weights + self.moments + self.gathered + self.gradients + self.layer_gradients

    def find_peak(self, *, keeps_gradients: bool) -> float:
        """Peak of a step. `keeps_gradients`: those of earlier micro-steps are there while the later ones are computed."""
        return max(max(self.at_loss, self.at_layer) + (self.gradients if keeps_gradients else 0.0), self.at_end)


def estimate_memory(
    model: TrainingModel,
    stacks: Sequence[nn.ModuleList],
    training: Training,
    recompute: str,
    shards: int,
    moment_bytes: int,
    objective_bytes: float,
) -> Memory:
    """Bytes of one rank on a GPU.

    Args:
        model: on the meta device.
        stacks: trained decoder layers of the objective.
        recompute: `activation_checkpoint.mode`.
        shards: ranks over which each weight is sharded.
        moment_bytes: of the moments of one weight.
        objective_bytes: from `Objective.estimate_memory`.
    """
    layers = find_decoder_layers(model.lm)
    counts = [_count_weights(layer) for layer in layers]
    total = _count_weights(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    compute = HALF if training.mixed_precision_param == "bfloat16" else FULL
    reshards = training.fsdp_reshard_after_forward and shards > 1
    gathered = total - sum(counts) + GATHERED_LAYERS * max(counts) if reshards else total
    is_trained = any(parameter.requires_grad for parameter in layers.parameters())
    trained_layers = [layer for stack in ((layers, *stacks) if is_trained else stacks) for layer in stack]
    factor = 1.0 if training.compile else EAGER
    whole = [factor * count_layer_kept(layer, model.lm.config) for layer in trained_layers]
    kept = whole if recompute == "none" else [count_layer_saved(layer, model.lm.config, recompute) for layer in trained_layers]
    vocab, width = model.output_embedding.shape
    tokens = training.seq_len
    return Memory(
        weights=0.0 if training.cpu_offload else FULL * total / shards,
        gradients=0.0 if training.cpu_offload else FULL * trained / shards,
        moments=0.0 if training.cpu_offload else moment_bytes * trained / shards,
        gathered=compute * gathered,
        activations=(sum(kept) + (AFTER_LAYERS * width if is_trained else 0.0)) * compute * tokens,
        recomputed=max([0.0, *(own - saved for own, saved in zip(whole, kept, strict=True))]) * compute * tokens,
        logits=min(CHUNK_BYTES, tokens * vocab * compute) if is_trained else 0.0,
        head_gradients=vocab * width * (FULL + compute) + tokens * width * compute if is_trained else 0.0,
        objective=objective_bytes,
        layer_gradients=GATHERED_LAYERS * max(counts) * (compute + FULL) if is_trained else 0.0,
    )


def _count_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_layer_kept(layer: nn.Module, config: PretrainedConfig) -> float:
    """Numbers that a compiled decoder layer keeps per token.

    A block of matrices, attention or feed-forward, keeps its input after the norm, the outputs of its matrices but the last, and
    the input of the last, whose own output goes into the residual stream. The stream itself is kept before each block. Of
    experts, those that a token is routed to count.
    """
    width, kept = config.hidden_size, 0.0
    for block in layer.modules():
        shapes = [shape for child in block.children() if (shape := _find_shape(child)) is not None]
        if shapes:
            into_stream = max((shape for shape in shapes if shape[1] == width), default=None)
            kept += sum(outputs for _, outputs in shapes)
            if into_stream is not None:
                kept += 2 * width + into_stream[0] - width  # the stream, its norm, the last input; not the last output
    experts = _list_expert_shapes(layer)
    return kept + config.num_experts_per_tok * sum(map(sum, experts)) if experts else kept


def count_layer_saved(layer: nn.Module, config: PretrainedConfig, recompute: str) -> float:
    """Numbers that a decoder layer keeps per token under a mode of `activation_checkpoint` other than "none".

    With "full" it keeps its input. With "pointwise" also the outputs of attention and of its matrices but the last, whose own
    goes into the stream. With "selective" only the first, third, fifth ... of those outputs, in the order in which the layer has
    its matrices. Those with a bias are left out of that count, and kept: only plain products are skipped.
    """
    kept = float(config.hidden_size)
    if recompute == "full":
        return kept
    if not is_recurrent(config):
        kept += config.num_attention_heads * find_head_dims(config)[1]
    if experts := _list_expert_shapes(layer):
        # One side of each is the model's width, the other the width inside, which is that of gate and up together where they are
        # one matrix. All but the last map into the latter.
        inside = [sum(shape) - config.hidden_size for shape in experts]
        kept += config.num_experts_per_tok * (sum(inside) - min(inside) + config.hidden_size)
    matrices = [(module, shape) for module in layer.modules() if (shape := _find_shape(module)) is not None]
    products = 0
    for module, (_, outputs) in matrices if experts else matrices[:-1]:
        is_product = isinstance(module, nn.Linear) and module.bias is None
        products += is_product
        if recompute == "pointwise" or not is_product or products % 2:
            kept += outputs
    return kept


def _list_expert_shapes(layer: nn.Module) -> list[tuple[int, int]]:
    """The two sides of the matrices that one expert has. Other weights of three dimensions are those of convolutions."""
    stacked = [weight for name, weight in layer.named_parameters() if ".experts." in f".{name}" and weight.ndim == 3]
    return [(weight.shape[1], weight.shape[2]) for weight in stacked]


def _find_shape(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a matrix; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None
