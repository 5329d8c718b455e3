"""Finds positions with the same future, by 62-bit hashes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

PRIME = 2**31 - 1
BASES = (742938285, 950706376)
"""Two of the best multipliers for this modulus by Fishman and Moore 1986, "An exhaustive analysis of multiplicative congruential
random number generators with modulus 2^31 - 1". Short futures that differ by little hardly ever collide under either."""


def hash_futures(input_ids: Tensor, segment_ids: Tensor, horizon: int = 0) -> Tensor:
    """Hash of the tokens from each position to the end of its document, or of the first `horizon` of them.

    Equal futures have equal hashes in all packed sequences and on all ranks. A hash joins two fingerprints (Karp and Rabin 1987,
    "Efficient randomized pattern-matching algorithms"). The future x_0, x_1, ... of token ids plus one is read as the polynomial
    x_0 + x_1 b + x_2 b^2 + ... modulo a prime p, at two bases b. Each value is a difference of two running sums of x_t b^t,
    divided by b^t. It waits for the device only at the first packed sequence of a length.

    Two different futures collide with a probability of about 1 / p^2 = 2^-62. Among K futures that makes K^2 / 2^63 colliding
    pairs: one in 10^7 packed sequences at K = 500,000. A collision removes one negative from an anchor. The hash gives no
    protection against collisions made on purpose.

    Args:
        input_ids: integers [T], less than 2^31 - 2.
        segment_ids: [T] document number of each token, non-decreasing.
        horizon: tokens that are hashed, including the position's own; 0 is all up to the end of the document. (A summary made by
            L layers with a window of k sees L k + 1 tokens.)

    Returns:
        int64 [T].
    """
    total = input_ids.numel()
    last = torch.searchsorted(segment_ids, segment_ids, side="right") - 1
    if horizon:
        last = torch.minimum(last, torch.arange(horizon - 1, total + horizon - 1, device=last.device))
    powers, inverses = _list_powers(total, input_ids.device)
    terms = (input_ids.long() + 1) * powers % PRIME
    sums = terms.flatten().cumsum(0).view(2, total)  # exact; the second row starts at the first's total, which differences cancel
    first, second = (sums[:, last] - sums + terms) % PRIME * inverses % PRIME
    return first << 31 | second


@lru_cache(maxsize=64)  # far more lengths than a run has: a CUDA graph reads these tensors as long as it lives
def _list_powers(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Powers 0 to count - 1 of the bases modulo `PRIME`, int64 [2, count], and their inverses."""
    powers = np.stack([_raise(base, count) for base in BASES])
    inverses = np.stack([_raise(pow(base, -1, PRIME), count) for base in BASES])
    return torch.from_numpy(powers).to(device), torch.from_numpy(inverses).to(device)


def _raise(base: int, count: int) -> np.ndarray:
    powers = np.ones(1, dtype=np.int64)
    while len(powers) < count:
        powers = np.concatenate([powers, powers * pow(base, len(powers), PRIME) % PRIME])
    return powers[:count]
