"""The model of transformers as its Trainer runs it with `bf16 = True`: float32 weights under torch.autocast, the documents of a
packed sequence told by their positions. On GPUs FlexAttention, since flash-attn has no wheel for this torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def build_step(shape: dict, pack: dict[str, torch.Tensor], options: argparse.Namespace) -> Callable[[], None]:
    """See the package."""
    tokens, labels, cu_seqlens = pack["input_ids"], pack["labels"], pack["cu_seqlens"]
    starts = cu_seqlens[:-1].long()
    positions = torch.arange(tokens.shape[1], device=tokens.device) - starts.repeat_interleave(cu_seqlens.diff().long())
    num_labels = (labels >= 0).sum()
    attention = "flex_attention" if tokens.is_cuda else "sdpa"
    torch.manual_seed(0)
    with torch.device(tokens.device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), attn_implementation=attention, dtype=torch.float32)
    model.train()
    run = torch.compile(model) if options.compile else model

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = run(
                input_ids=tokens,
                position_ids=positions.unsqueeze(0),
                labels=labels,
                shift_labels=labels,
                num_items_in_batch=num_labels,
                use_cache=False,
            ).loss
        loss.backward()
        model.zero_grad()

    return step
