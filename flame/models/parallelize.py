"""8-bit training products, activation checkpointing, compilation and FSDP2, in the order in which they must be applied."""

from __future__ import annotations

from itertools import chain
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from flame.components.titan import FullAC, SelectiveAC
from flame.config import JobConfig, Training
from flame.models.causal_lm import find_decoder_layers, initialize
from flame.models.float8_training import convert_to_float8
from flame.models.future_lm import FutureLM


def parallelize(model: FutureLM, config: JobConfig, mesh: DeviceMesh) -> None:
    """Wrap a model on meta, in place.

    Args:
        mesh: one-dimensional (FSDP) or two-dimensional, replicate x shard (HSDP).

    Raises:
        UserError: `training.float8` on a device, or of a model, that cannot.
    """
    # Not with `training.compile` alone: on GPUs the estimators' own functions are compiled in any case.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    layers = find_decoder_layers(model.lm)
    if config.training.float8:
        convert_to_float8(layers, mesh.device_type)
    heads = [find_decoder_layers(cast(PreTrainedModel, part)) for part in model.rival.layers] if model.rival is not None else []
    for trained in (layers, *heads):
        _checkpoint_activations(trained, config)
    teacher_layers = find_decoder_layers(model.teacher) if model.teacher is not None else nn.ModuleList()
    if config.training.compile:
        _compile(model, [*layers, *teacher_layers, *chain(*heads)], layers)
    _shard(model, [*layers, *teacher_layers], config, mesh)


MOST_GRAPHS = 128
"""That torch may compile of one function, where it would go on uncompiled beyond 8, so that a resumed run, which compiles anew,
would round differently. Of a layer: one for each share of a pack that is read (`answer_tails.SHARES`) and one for the whole, in
each pass, in training and in validation, and for each kind of layer. Of an estimator's functions: one for each
`future_mask.find_room` of anchors, with a gradient and without."""


def _compile(model: FutureLM, layers: list[nn.Module], own: nn.ModuleList) -> None:
    """Compile each decoder layer, once for all of them, and what stands beside the language model's own ones: the last norm and
    the predictor."""
    beside = [
        module
        for module in model.lm.base_model.children()
        if module is not own and not isinstance(module, nn.Embedding) and any(True for _ in module.parameters())
    ]
    predictor = [model.predictor] if model.predictor is not None else []
    for module in (*layers, *beside, *predictor):
        module.compile(dynamic=False)


class _SelectiveAC(SelectiveAC):
    def get_save_ops(self) -> set:
        return super().get_save_ops() | {torch.ops.flame.varlen_attention.default}


def _checkpoint_activations(layers: nn.ModuleList, config: JobConfig) -> None:
    policies = {"full": FullAC, "selective": _SelectiveAC}
    if config.activation_checkpoint.mode in policies:
        policy = policies[config.activation_checkpoint.mode]
        holder = nn.Module()  # the library wraps, in place, what it finds under the name `layers`
        holder.layers = layers
        policy(policy.Config()).apply(holder)


MOST_WEIGHTS_IN_ONE_GROUP = 100_000_000
"""That one device keeps in a single FSDP group. With more, a group for each layer bounds what is held of gradients at the end of
the backward: alone, some 10 bytes a weight. A small model waits for the launches of each group (benchmarks/groups.py)."""


def find_compute_dtype(training: Training, device_type: str) -> torch.dtype:
    """Of parameters in a forward."""
    return getattr(torch, training.mixed_precision_param) if device_type == "cuda" else torch.float32


def _shard(model: FutureLM, layers: list[nn.Module], config: JobConfig, mesh: DeviceMesh) -> None:
    training = config.training
    on_gpu = mesh.device_type == "cuda"
    policy = MixedPrecisionPolicy(param_dtype=find_compute_dtype(training, mesh.device_type), reduce_dtype=torch.float32)
    reshard = training.fsdp_reshard_after_forward and mesh.size(mesh.ndim - 1) > 1
    offload = CPUOffloadPolicy() if training.cpu_offload and on_gpu else OffloadPolicy()
    is_one_group = mesh.size() == 1 and sum(weight.numel() for weight in model.parameters()) <= MOST_WEIGHTS_IN_ONE_GROUP
    for layer in layers if not is_one_group else ():
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for module in model.modules() if mesh.size() > 1 else ():  # alone, FSDP would divide by 1.0, in a pass over all gradients
        if isinstance(module, FSDPModule):
            # Losses are divided by global counts, so gradients are summed over ranks. Gloo cannot divide and needs plain sums.
            module.set_gradient_divide_factor(1.0)
            if not on_gpu:
                module.set_force_sum_reduction_for_comms(True)


def materialize(model: FutureLM, device: torch.device, seed: int, *, cpu_offload: bool = False) -> None:
    """Give a parallelized model storage and initial weights that depend on the seed alone.

    The language model draws first: its weights are the same whatever is learned beside the next token. A teacher draws other
    ones.

    Args:
        cpu_offload: keep the parameters in host memory; buffers, which no one brings to the device for a pass, live there.
    """
    home = torch.device("cpu") if cpu_offload else device
    initialize(model.lm, home, seed)
    for offset, module in enumerate((model.predictor, model.estimator, model.rival, model.teacher), start=1):
        if module is not None:
            initialize(module, home, seed + offset)
    if cpu_offload:
        for part in model.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(device)
