"""Summaries of each position's future: the labels of the future loss.

They come from the network's own anti-causal pass, or from a control (`future_encoder.target`) that helps to explain why a future
loss falls.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.attention.families import list_layer_limits, tighten
from flame.data.batch import PackedBatch
from flame.models.wrapper import TrainingModel
from flame.objectives.future.answer_suffixes import cut_suffixes
from flame.objectives.future.options import FutureOptions

FIXED_POINT = 2.0**40
"""Scale of sums of embeddings: a resolution of 1e-12, and sums over a document of up to 8 million."""


@torch.no_grad()
def summarize(
    backbone: TrainingModel,
    batch: PackedBatch,
    options: FutureOptions,
    network: PreTrainedModel | None = None,
    layers: int = 0,
) -> Tensor:
    """Summaries [T, d] of a packed sequence. If only answers count, those in prompts are arbitrary.

    Args:
        network: runs the anti-causal pass; None is the language model.
        layers: decoder layers of it that run, from the first; 0 is all.
    """
    if options.target == "causal":
        return backbone.encode_past(batch)
    if options.target == "mean_embedding":
        return average_ahead(backbone.embed_tokens(batch), batch.segment_ids[0], options.future_k)
    suffixes = cut_suffixes(batch) if batch.answers_only else None
    if suffixes is None:
        return backbone.encode_future(batch, options.future_k, network, layers)
    summaries = backbone.encode_future(suffixes.batch, options.future_k, network, layers)
    return suffixes.spread(summaries, batch.input_ids.shape[1])


def find_horizon(options: FutureOptions, config: PretrainedConfig) -> int:
    """Number of tokens that a summary covers, including its own; 0 is all up to the end of the document. The causal pass covers
    no future; for it, too, all tokens to the end count as the future.

    Args:
        config: of the model, whose layers may have their own windows.
    """
    if options.target == "causal":
        return 0
    own = [0] if options.target == "mean_embedding" else list_layer_limits(config)[: options.pass_layers or None]
    limits = [tighten(limit, options.future_k) for limit in own]
    return sum(limits) + 1 if all(limits) else 0


def average_ahead(embeddings: Tensor, segment_ids: Tensor, window_k: int) -> Tensor:
    """Mean vector over each token and those after it in its document: all of them, or the next `window_k` if that is not 0.

    Args:
        embeddings: [T, d].
        segment_ids: [T], non-decreasing.
    """
    index = torch.arange(len(embeddings), device=embeddings.device)
    end = torch.searchsorted(segment_ids, segment_ids, side="right")
    if window_k:
        end = torch.minimum(end, index + window_k + 1)
    # Differences of running sums in fixed point are exact, so results repeat to the bit; sums of floats on GPUs do not. An
    # overflow over a long packed sequence cancels in the difference.
    terms = (embeddings.double() * FIXED_POINT).round().long()
    sums = torch.cat([terms.new_zeros(1, terms.shape[1]), terms.cumsum(0)])
    return ((sums[end] - sums[index]).double() / FIXED_POINT / (end - index)[:, None]).to(embeddings.dtype)


def shuffle_valid(is_valid: Tensor, seed: int) -> Tensor:
    """A random order, int64 [n], that permutes the valid rows among themselves. is_valid: bool [n]."""
    generator = torch.Generator(is_valid.device).manual_seed(seed)
    priority = torch.rand(is_valid.shape, generator=generator, device=is_valid.device)
    positions = is_valid.byte().argsort(descending=True, stable=True)
    drawn = (priority + is_valid).argsort(descending=True)
    return torch.empty_like(positions).index_copy_(0, positions, drawn)
