"""torchtitan 0.2.2's Llama, with variable-length attention and compiled layers, as its trainer has it on one GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.components.quantization.float8 import Float8LinearConverter
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.attention import VarlenMetadata
from torchtitan.models.llama3.model.args import TransformerModelArgs
from torchtitan.models.llama3.model.model import Transformer


def build_step(shape: dict, pack: dict[str, torch.Tensor], options: argparse.Namespace) -> Callable[[], None]:
    """See the package. With float32 weights bfloat16 is left to torch.autocast, as in the trainer; with bfloat16 weights, which
    no trainer should update, nothing is cast."""
    tokens, labels, cu_seqlens = pack["input_ids"], pack["labels"], pack["cu_seqlens"]
    longest = int(cu_seqlens.diff().max())
    documents = VarlenMetadata(cu_seqlens, cu_seqlens, longest, longest)
    num_labels = int((labels >= 0).sum())
    settings = TransformerModelArgs(
        dim=shape["hidden_size"],
        n_layers=shape["num_hidden_layers"],
        n_heads=shape["num_attention_heads"],
        n_kv_heads=shape["num_key_value_heads"],
        ffn_dim_multiplier=1.5,
        multiple_of=256,
        vocab_size=shape["vocab_size"],
        norm_eps=shape["rms_norm_eps"],
        rope_theta=shape["rope_theta"],
        max_seq_len=tokens.shape[1],
        attn_type="varlen",
        attn_mask_type="block_causal",
    )
    torch.manual_seed(0)
    with torch.device(tokens.device):
        model = Transformer(settings)
    with torch.no_grad():
        model.init_weights(buffer_device=tokens.device)
    if options.float8:
        _convert(model, options.float8)
    weights = getattr(torch, options.weights)
    model.to(weights)
    for name, layer in list(model.layers.named_children()):
        assert layer.feed_forward.w1.out_features == shape["intermediate_size"]
        model.layers.register_module(name, torch.compile(layer))
    sum_cross_entropy = torch.compile(cross_entropy_loss)

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=weights == torch.float32):
            loss = sum_cross_entropy(model(tokens, documents), labels) / num_labels
        loss.backward()
        model.zero_grad()

    return step


def _convert(model: torch.nn.Module, recipe: str) -> None:
    """Exchange the linear layers in place, as torchtitan does with the converter "quantize.linear.float8"."""

    job = JobConfig()
    job.compile.enable = True
    job.quantize.linear.float8.recipe_name = recipe
    job.quantize.linear.float8.filter_fqns = ["output"]
    one = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    Float8LinearConverter(job, one).convert(model)
