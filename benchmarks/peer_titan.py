"""Worker of `benchmarks.peers`: next-token steps of torchtitan's own Llama, in a process whose torchtitan is 0.2.2.

    PYTHONPATH=SITE python -m benchmarks.peer_titan MODEL.json PACK.pt [--weights float32] [--float8 rowwise]

PACK.pt holds input_ids and labels, int64 [1, T], and cu_seqlens, int32 [S+1]. For each line "run N" on standard input it makes N
steps, forward and backward without optimizer, and answers with one line of JSON: N lists of milliseconds, peak bytes and bytes
before, or null if memory ran out. It ends when standard input does. With float32 weights the step is that of torchtitan's trainer
on one GPU, which leaves bfloat16 to torch.autocast. With bfloat16 weights, which no trainer should update, nothing is cast. With
--float8 torchtitan's own converter takes all linear layers but the output head to 8 bits, by that recipe of torchao.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.timing import Sample, sample

VERSION = "0.2.2"
DEVICE = torch.device("cuda")


def build_step(shape: dict, pack: dict[str, torch.Tensor], weights: torch.dtype, float8: str = "") -> Callable[[], None]:
    """Build torchtitan's Llama with variable-length attention and compiled layers, as its trainer would on one GPU.

    Args:
        shape: a Hugging Face Llama configuration.
        pack: see the module.
        weights: float32 or bfloat16.
        float8: recipe of torchao; empty for bfloat16.
    """
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.attention import VarlenMetadata
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    tokens, labels, cu_seqlens = (pack[name].to(DEVICE) for name in ("input_ids", "labels", "cu_seqlens"))
    longest = int(pack["cu_seqlens"].diff().max())
    documents = VarlenMetadata(cu_seqlens, cu_seqlens, longest, longest)
    num_labels = int((pack["labels"] >= 0).sum())
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
    with torch.device(DEVICE):
        model = Transformer(settings)
    with torch.no_grad():
        model.init_weights(buffer_device=DEVICE)
    if float8:
        convert(model, float8)
    model.to(weights)
    for name, layer in list(model.layers.named_children()):
        assert layer.feed_forward.w1.out_features == shape["intermediate_size"]
        model.layers.register_module(name, torch.compile(layer))
    sum_cross_entropy = torch.compile(cross_entropy_loss)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=weights == torch.float32):
            loss = sum_cross_entropy(model(tokens, documents), labels) / num_labels
        loss.backward()
        model.zero_grad()

    return step


def convert(model: torch.nn.Module, recipe: str) -> None:
    """Exchange the linear layers in place, as torchtitan does with the converter "quantize.linear.float8"."""
    from torchtitan.components.quantization.float8 import Float8LinearConverter
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims

    job = JobConfig()
    job.compile.enable = True
    job.quantize.linear.float8.recipe_name = recipe
    job.quantize.linear.float8.filter_fqns = ["output"]
    one = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    Float8LinearConverter(job, one).convert(model)


def answer(step: Callable[[], None], count: int) -> list[Sample] | None:
    gc.collect(1)
    try:
        return [sample(step) for _ in range(count)]
    except torch.OutOfMemoryError:
        return None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--float8", default="")
    arguments = parser.parse_args(argv)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print must not mix with the replies
    found = version("torchtitan")
    if found != VERSION:
        sys.exit(f"torchtitan {found} is first on the import path: PYTHONPATH must begin with a folder that holds {VERSION}")
    shape, pack = json.loads(arguments.model.read_text()), torch.load(arguments.pack)
    step = build_step(shape, pack, getattr(torch, arguments.weights), arguments.float8)
    gc.collect()
    gc.disable()
    for line in sys.stdin:
        verb, count = line.split()
        assert verb == "run"
        print(json.dumps(answer(step, int(count))), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
