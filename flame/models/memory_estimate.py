"""Estimates the peak memory of a rank on a GPU, from a model on the meta device.

What a decoder layer keeps from its forward to its backward is counted, per token, from its matrices: the compiler keeps the
inputs and outputs of matrix products and the residual stream, and recomputes what lies between. docs/performance.md compares the
estimate with measured peaks (`python -m benchmarks.memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from flame.config.training import Training
from flame.kernels.softmax_rows import CHUNK_BYTES
from flame.models.causal_lm import find_decoder_layers
from flame.models.wrapper import TrainingModel

HALF, FULL = 2, 4
"""Bytes of a number in bfloat16 and float32."""
GATHERED_LAYERS = 2
"""Layers whose whole weights are there at once: the one that is computed and the next."""
EAGER = 1.46
"""Times as much is kept without training.compile: each operation keeps its own input, norms in float32. Fitted to one run."""
KEPT = {"pointwise": 0.68, "selective": 0.62}
"""Share that modes of activation_checkpoint keep: for "pointwise" as measured at 1B, for "selective" a guess."""


class Memory(NamedTuple):
    """Bytes of one rank."""

    weights: float
    gradients: float
    moments: float
    gathered: float
    """Weights in the compute dtype, gathered from all ranks."""
    activations: float
    logits: float
    """A chunk of logits, and gradients of the output embedding and of the last hidden states."""
    objective: float
    """What the objective keeps beside its weights."""
    layer_gradients: float
    """Of the layers that are computed, before they are summed over ranks."""

    @property
    def at_loss(self) -> float:
        """When the cross entropy is computed: all activations are there."""
        return self.weights + self.moments + self.gathered + self.activations + self.logits + self.objective

    @property
    def at_end(self) -> float:
        """When the backward ends: all gradients are there, and no activations."""
        return self.weights + self.moments + self.gathered + self.gradients + self.layer_gradients

    def find_peak(self, *, keeps_gradients: bool) -> float:
        """Peak of a step. `keeps_gradients`: those of earlier micro-steps are there while the later ones are computed."""
        return max(self.at_loss + (self.gradients if keeps_gradients else 0.0), self.at_end)


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
    kept = sum(_count_kept(each, model.lm.config, training, recompute) for each in ((layers, *stacks) if is_trained else stacks))
    vocab, width = model.output_embedding.shape
    tokens = training.seq_len
    logits = min(CHUNK_BYTES, tokens * vocab * compute) + vocab * width * (FULL + compute) + tokens * width * compute
    return Memory(
        weights=0.0 if training.cpu_offload else FULL * total / shards,
        gradients=0.0 if training.cpu_offload else FULL * trained / shards,
        moments=0.0 if training.cpu_offload else moment_bytes * trained / shards,
        gathered=compute * gathered,
        activations=kept * compute * tokens,
        logits=logits if is_trained else 0.0,
        objective=objective_bytes,
        layer_gradients=GATHERED_LAYERS * max(counts) * (compute + FULL) if is_trained else 0.0,
    )


def _count_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_kept(layers: nn.ModuleList, config: PretrainedConfig, training: Training, recompute: str) -> float:
    """Numbers kept per token from forward to backward, over all layers."""
    width = config.hidden_size
    whole = [count_layer_kept(layer, config) * (1.0 if training.compile else EAGER) for layer in layers]
    if recompute == "full":
        return len(whole) * width + max(whole, default=0.0)
    return sum(whole) * KEPT.get(recompute, 1.0)


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
        experts = [parameter for name, parameter in block.named_parameters(recurse=False) if parameter.ndim == 3]
        if experts:
            sides = sum(sum(parameter.shape[1:]) for parameter in experts)
            kept += config.num_experts_per_tok * sides
    return kept


def _find_shape(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a matrix; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None
