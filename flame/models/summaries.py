"""What each position's future is summed up as: the label that its guess is compared with.

The network's own anti-causal pass, or one of the controls that tell why a future loss falls (`future_encoder.target`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from flame.config import JobConfig
from flame.data.batch import PackedBatch
from flame.models.answer_tails import cut_tails
from flame.models.families import list_layer_limits, tighten
from flame.models.future_lm import FutureLM
from flame.objective_config import FutureEncoder

FIXED_POINT = 2.0**40
"""Of sums of embeddings: steps of 1e-12, and sums of a document up to 8 million."""


@torch.no_grad()
def summarize(model: FutureLM, batch: PackedBatch, config: JobConfig) -> Tensor:
    """Summaries [T, d] of a packed batch; where only answers count, zeros or others in prompts."""
    future = config.future_encoder
    if future.target == "causal":
        return model.encode_past(batch)
    if future.target == "mean_embedding":
        embeddings = model.lm.get_input_embeddings()(batch.input_ids)[0]
        return average_ahead(embeddings, batch.segment_ids[0], future.future_k)
    tails = cut_tails(batch) if config.training.loss_on == "answer" else None
    if tails is None:
        return model.encode_future(batch, future.future_k)
    return tails.spread(model.encode_future(tails.batch, future.future_k), batch.input_ids.shape[1])


def find_reach(future: FutureEncoder, config: PretrainedConfig) -> int:
    """Tokens that a summary is made of, its own one included; 0 is all up to the end of the document. (Of the causal pass, which
    has seen none of them, it is all that count as its future.)

    Args:
        config: of the model, whose layers may have windows of their own.
    """
    if future.target == "causal":
        return 0
    own = [0] if future.target == "mean_embedding" else list_layer_limits(config)
    limits = [tighten(limit, future.future_k) for limit in own]
    return sum(limits) + 1 if all(limits) else 0


def average_ahead(embeddings: Tensor, segment_ids: Tensor, window_k: int) -> Tensor:
    """Mean of the vectors of each token and those behind it in its document, at most `window_k` of them where not 0.

    Args:
        embeddings: [T, d]. segment_ids: [T], non-decreasing.
    """
    index = torch.arange(len(embeddings), device=embeddings.device)
    end = torch.searchsorted(segment_ids, segment_ids, side="right")
    if window_k:
        end = torch.minimum(end, index + window_k + 1)
    # Differences of sums, in fixed point: exact, so that they repeat to the bit, which sums of floats on GPUs do not. What
    # overflows over a long pack cancels in the difference.
    terms = (embeddings.double() * FIXED_POINT).round().long()
    sums = torch.cat([terms.new_zeros(1, terms.shape[1]), terms.cumsum(0)])
    return ((sums[end] - sums[index]).double() / FIXED_POINT / (end - index)[:, None]).to(embeddings.dtype)


def shuffle_valid(is_valid: Tensor, seed: int) -> Tensor:
    """A random order, int64 [n], that deals the valid ones of n rows among their places. is_valid: bool [n]."""
    generator = torch.Generator(is_valid.device).manual_seed(seed)
    priority = torch.rand(is_valid.shape, generator=generator, device=is_valid.device)
    places = is_valid.byte().argsort(descending=True, stable=True)
    drawn = (priority + is_valid).argsort(descending=True)
    return torch.empty_like(places).index_copy_(0, places, drawn)
