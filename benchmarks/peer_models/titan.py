"""torchtitan 0.3.0's Llama as its trainer builds and runs it on one GPU: FSDP2 on a mesh of one rank, float32 weights, bfloat16
arithmetic, compiled layers, FlexAttention by default, cross entropy in eight chunks. Of its models the one of 1B is taken."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.quantization import Float8LinearConverter
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as distributed
from torchtitan.models.llama3 import model_registry, parallelize_llama
from torchtitan.models.llama3.sharding import set_llama3_sharding_config

from flame.runtime.distributed import set_single_process_defaults


def build_step(shape: dict, pack: dict[str, torch.Tensor], options: argparse.Namespace) -> Callable[[], None]:
    """See the package."""
    tokens, labels, cu_seqlens = pack["input_ids"], pack["labels"], pack["cu_seqlens"]
    length, device = tokens.shape[1], tokens.device
    starts = cu_seqlens[:-1].long()
    positions = torch.arange(length, device=device) - starts.repeat_interleave(cu_seqlens.diff().long())
    num_labels = (labels >= 0).sum()
    set_single_process_defaults()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
    dims.build_mesh()
    parallelism = ParallelismConfig()
    distributed.set_spmd_backend(parallelism.spmd_backend)
    converters = [Float8LinearConverter.Config(recipe_name=options.float8, filter_fqns=["lm_head"])] if options.float8 else None
    settings = model_registry("1B", options.attention, converters=converters).model
    sizes = shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"]
    assert (settings.dim, len(settings.layers), settings.vocab_size) == sizes
    for layer in settings.layers:
        layer.attention.rope = replace(layer.attention.rope, max_seq_len=length)
    set_llama3_sharding_config(settings, enable_sp=parallelism.enable_sequence_parallel)
    compiled = CompileConfig(enable=True)
    with torch.device("meta"):
        model = settings.build()
    loss_function = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=shape["vocab_size"])).build(
        compile_config=compiled
    )
    model = parallelize_llama(
        model,
        parallel_dims=dims,
        training=TrainingConfig(seq_len=length, local_batch_size=1),
        parallelism=parallelism,
        compile_config=compiled,
        ac_config=None,
        dump_folder="",
    )
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    model.train()
    loss_function.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    positions = positions.unsqueeze(0)
    masks = model.get_attention_masks(positions=positions)

    def step() -> None:
        states = model(tokens, positions=positions, attention_masks=masks)
        loss, _ = loss_function(states, labels, num_labels, positions=positions)
        loss.backward()
        model.zero_grad()

    return step
