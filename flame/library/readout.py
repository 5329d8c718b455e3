"""What a state knows of its future: a linear read-out of token t + k from the hidden state h_t.

For each k a softmax regression, logits = W h_t + b, is trained on the states of a model that stays as it is. Its held-out cross
entropy is compared with that of the unigram frequencies, which know nothing of h_t. Token t + k is read within the document of t
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.library.passes import encode_past
from flame.library.texts import pack

EPOCHS = 8
BATCH = 512
"""Pairs of state and token in a step."""
LEARNING_RATE = 0.3
"""Of AdamW, divided by the square root of the width; it falls to 0 by a cosine."""
CHOOSING_SHARE = 0.1
"""Of the pairs to learn from: those that choose the epoch. Otherwise a read-out with more weights than pairs would overfit."""
LEAST_PAIRS = 5
"""To learn from. Of fewer, none would choose the epoch."""
ADDED_COUNT = 0.5
"""Added to the count of each token in the unigram frequencies, so that no token is impossible."""


class Readout(NamedTuple):
    """The read-out of token t + k, in nats on held-out documents."""

    horizon: int
    """k"""
    pairs: int
    """Held-out pairs."""
    unigram: float
    """Cross entropy of the frequencies of tokens in the training documents."""
    loss: float
    """Cross entropy of the read-out."""
    accuracy: float
    """Share of pairs whose token gets the highest logit."""

    @property
    def known(self) -> float:
        """Nats that the state tells of the token, linearly."""
        return self.unigram - self.loss


@torch.no_grad()
def encode_documents(lm: nn.Module, documents: Sequence[Tensor], most_tokens: int) -> list[Tensor]:
    """Final hidden states of each document, float32 [n, d], on the CPU."""
    found: list[Tensor] = []
    for tokens, cu_seqlens in pack(documents, most_tokens):
        states = encode_past(lm, tokens, cu_seqlens).float().cpu()
        found += states.split(cu_seqlens.diff().tolist())
    return found


def pair_ahead(states: Sequence[Tensor], documents: Sequence[Tensor], horizon: int) -> tuple[Tensor, Tensor]:
    """States [n, d] and the tokens int64 [n] that are `horizon` later in the same document."""
    pairs = [
        (vectors[: len(tokens) - horizon], tokens[horizon:])
        for vectors, tokens in zip(states, documents, strict=True)
        if len(tokens) > horizon
    ]
    if not pairs:
        return states[0][:0], documents[0][:0]
    return torch.cat([vectors for vectors, _ in pairs]), torch.cat([tokens for _, tokens in pairs])


def measure(
    lm: nn.Module, train: Sequence[Tensor], test: Sequence[Tensor], horizons: Sequence[int], most_tokens: int, seed: int = 0
) -> Iterator[Readout]:
    """Yield the read-out of each horizon. Horizons without held-out pairs, or with fewer than 5 to learn from, are left out.

    Args:
        train, test: documents, int64 [n] each, that the read-out learns from and that it is measured on.
        most_tokens: of a forward.
    """
    device = next(lm.parameters()).device
    vocabulary_size = lm.get_input_embeddings().num_embeddings  # type: ignore[operator]
    states = [encode_documents(lm, documents, most_tokens) for documents in (train, test)]
    everything = torch.cat(states[0])
    center, scale = everything.mean(0), everything.std(0).clamp(min=1e-6)
    states = [[(vectors - center) / scale for vectors in part] for part in states]
    for horizon in horizons:
        seen, asked = (pair_ahead(part, documents, horizon) for part, documents in zip(states, (train, test), strict=True))
        if len(seen[1]) >= LEAST_PAIRS and len(asked[1]):
            yield fit(seen, asked, vocabulary_size, horizon, device, seed)


def fit(
    seen: tuple[Tensor, Tensor],
    asked: tuple[Tensor, Tensor],
    vocabulary_size: int,
    horizon: int,
    device: torch.device,
    seed: int,
) -> Readout:
    """Train the read-out on pairs of state [n, d] and token [n], 5 or more, and measure it on others."""
    cut = round(len(seen[1]) * (1 - CHOOSING_SHARE))
    seen, choosing = (seen[0][:cut], seen[1][:cut]), (seen[0][cut:], seen[1][cut:])
    counts = torch.bincount(seen[1], minlength=vocabulary_size).float() + ADDED_COUNT
    frequencies = (counts / counts.sum()).log().to(device)
    head = nn.Linear(seen[0].shape[1], vocabulary_size, device=device)
    with torch.no_grad():
        head.weight.zero_()  # so that it begins as the frequencies
        head.bias.copy_(frequencies)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE * seen[0].shape[1] ** -0.5, weight_decay=0.0)
    steps = EPOCHS * -(-len(seen[1]) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    best, kept = _ask(head, choosing)[0], deepcopy(head.state_dict())
    for _ in range(EPOCHS):
        for index in torch.randperm(len(seen[1]), generator=generator).split(BATCH):
            loss = F.cross_entropy(head(seen[0][index].to(device)), seen[1][index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (now := _ask(head, choosing)[0]) < best:
            best, kept = now, deepcopy(head.state_dict())
    head.load_state_dict(kept)
    unigram = -frequencies[asked[1].to(device)].mean().item()
    return Readout(horizon, len(asked[1]), unigram, *_ask(head, asked))


@torch.no_grad()
def _ask(head: nn.Linear, pairs: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Cross entropy and accuracy of a read-out; NaN if there are no pairs."""
    total = correct = 0.0
    for vectors, tokens in zip(pairs[0].split(BATCH), pairs[1].split(BATCH), strict=True):
        logits, labels = head(vectors.to(head.weight.device)), tokens.to(head.weight.device)
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(-1) == labels).sum().item()
    count = len(pairs[1])
    return (total / count, correct / count) if count else (float("nan"), float("nan"))
