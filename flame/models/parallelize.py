"""8-bit products, dropout, activation checkpointing, compilation and FSDP2, in the order in which they must be applied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from flame.config.training import Training
from flame.kernels.float8_head import check_float8_head
from flame.kernels.float8_training import convert_to_float8
from flame.models.causal_lm import find_decoder_layers
from flame.models.dropout import add_dropout
from flame.models.wrapper import TrainingModel
from flame.runtime.torchtitan import FullAC, SelectiveAC


class Stack(Protocol):
    """Decoder layers beside the language model's; see `flame.objectives.base.LayerStack`."""

    @property
    def layers(self) -> nn.ModuleList: ...
    @property
    def is_trained(self) -> bool: ...
    @property
    def is_network(self) -> bool: ...


def parallelize(
    model: TrainingModel,
    stacks: Sequence[Stack],
    compiled: Sequence[nn.Module],
    training: Training,
    recompute: str,
    mesh: DeviceMesh,
) -> None:
    """Wrap a model on the meta device, in place.

    Args:
        stacks: the objective's decoder layers. Those of a network become FSDP groups like the language model's.
        compiled: other modules of the objective to compile.
        recompute: `activation_checkpoint.mode`.
        mesh: one-dimensional (FSDP) or two-dimensional, replicate x shard (HSDP).

    Raises:
        UserError: the device or the model does not support `training.float8`, `training.float8_head` or `training.dropout`.
    """
    # Also without `training.compile`: on GPUs the estimators' functions are always compiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    layers = find_decoder_layers(model.lm)
    if training.float8 != "none":
        convert_to_float8(layers, training.float8, mesh.device_type)
    if training.float8_head:
        check_float8_head(mesh.device_type)
        model.has_float8_head = True
    if training.dropout and any(parameter.requires_grad for parameter in model.lm.parameters()):
        add_dropout(model.lm, training.dropout)
        model.has_dropout = True
    for trained in (layers, *(stack.layers for stack in stacks if stack.is_trained)):
        _checkpoint_activations(trained, recompute)
    if training.compile:
        _compile(model, [*layers, *chain(*(stack.layers for stack in stacks))], layers, compiled)
    further = [layer for stack in stacks if stack.is_network or not stack.is_trained for layer in stack.layers]
    _shard(model, [*layers, *further], training, mesh)


MOST_GRAPHS = 128
"""Most graphs that torch may compile of one function. Beyond torch's own limit of 8, it would run uncompiled, and a resumed run,
which compiles again, would round differently. A decoder layer needs a graph for each of `flame.data.suffix_layout.SHARES` and for
the whole packed sequence, in each pass, in training and validation, and for each kind of layer. An estimator's function needs a
graph for each bucket of anchors (`flame.data.buckets.round_up_to_bucket`), with and without gradient."""


def _compile(model: TrainingModel, layers: list[nn.Module], own: nn.ModuleList, further: Sequence[nn.Module]) -> None:
    """Compile the decoder layers, which share their graphs, and the language model's other modules, such as the last norm."""
    beside = [
        module
        for module in model.lm.base_model.children()
        if module is not own and not isinstance(module, nn.Embedding) and any(True for _ in module.parameters())
    ]
    for module in (*layers, *beside, *further):
        module.compile(dynamic=False)


class _SelectiveAC(SelectiveAC):
    """Keeps the outputs of attention and of every second matrix product. Compiled layers alone: a layer may change a product in
    place, and the compiler takes such changes out."""

    def get_save_ops(self) -> set:
        aten = torch.ops.aten
        further = {aten._grouped_mm.default, aten._scaled_dot_product_flash_attention_for_cpu.default}
        return super().get_save_ops() | further | {torch.ops.flame.varlen_attention.default}


class _PointwiseAC(_SelectiveAC):
    """Keeps the outputs of all matrix products, and of attention where it is an operator of torch's or ours: FlexAttention and
    fla's kernels run again."""

    def _wrap_block(self, module: nn.Module, *, base_fqn: str | None = None) -> nn.Module:
        # The set also has higher-order operators, with which dynamo does not compile the layer.
        kept = [op for op in self.get_save_ops() if isinstance(op, torch._ops.OpOverload)]
        return checkpoint_wrapper(module, context_fn=partial(create_selective_checkpoint_contexts, kept), early_stop=False)


def _checkpoint_activations(layers: nn.ModuleList, mode: str) -> None:
    policies = {"full": FullAC, "selective": _SelectiveAC, "pointwise": _PointwiseAC}
    if mode in policies:
        policy = policies[mode]
        holder = nn.Module()  # torchtitan wraps the layers of the attribute `layers`, in place
        holder.layers = layers
        policy(policy.Config()).apply(holder)


MOST_WEIGHTS_IN_ONE_GROUP = 100_000_000
"""Up to this many weights, a single device uses one FSDP group, since small models are slowed by the launches of each group
(benchmarks/groups.py). Larger models use a group for each layer, which limits the memory of gradients at the end of the backward.
In one group they take about 10 bytes per weight."""


def find_compute_dtype(training: Training, device_type: str) -> torch.dtype:
    """Dtype of parameters in a forward."""
    return getattr(torch, training.mixed_precision_param) if device_type == "cuda" else torch.float32


def _shard(model: TrainingModel, layers: list[nn.Module], training: Training, mesh: DeviceMesh) -> None:
    on_gpu = mesh.device_type == "cuda"
    policy = MixedPrecisionPolicy(param_dtype=find_compute_dtype(training, mesh.device_type), reduce_dtype=torch.float32)
    reshard = training.fsdp_reshard_after_forward and mesh.size(mesh.ndim - 1) > 1
    offload = CPUOffloadPolicy() if training.cpu_offload and on_gpu else OffloadPolicy()
    is_one_group = mesh.size() == 1 and sum(weight.numel() for weight in model.parameters()) <= MOST_WEIGHTS_IN_ONE_GROUP
    for layer in layers if not is_one_group else ():
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for module in model.modules() if mesh.size() > 1 else ():  # one rank skips it: dividing by 1.0 would read all gradients
        if isinstance(module, FSDPModule):
            # Losses are divided by global counts, so gradients are summed over ranks. Gloo cannot divide and needs plain sums.
            module.set_gradient_divide_factor(1.0)
            if not on_gpu:
                module.set_force_sum_reduction_for_comms(True)


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move all buffers to a device. With CPU offload, FSDP moves only parameters there."""
    for part in model.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
