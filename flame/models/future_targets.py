"""Which positions have the same future, told by 62-bit hashes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

PRIME = 2**31 - 1
BASES = (742938285, 950706376)
"""Two of the best multipliers for this modulus by Fishman and Moore 1986, "An exhaustive analysis of multiplicative congruential
random number generators with modulus 2^31 - 1": a few tokens that differ by little are hardly ever a zero of either."""


def hash_futures(input_ids: Tensor, segment_ids: Tensor, reach: int = 0) -> Tensor:
    """Hash of the tokens from each position to the end of its document, or of the first `reach` of them.

    Equal futures have equal hashes, wherever they are, in whichever pack, on whichever rank. A hash is two fingerprints (Karp and
    Rabin 1987, "Efficient randomized pattern-matching algorithms"): the future x_0, x_1, ... of token ids plus one is read as the
    polynomial x_0 + x_1 b + x_2 b^2 + ... modulo a prime p, at two bases b. All of them are differences of one running sum of
    x_t b^t, divided by b^t: 17 operations for the pack, which wait for the device at the first pack of a length alone.

    Different futures get the same hash only by accident. Their difference, a polynomial of their length L, is zero at fewer than
    L of the p values that each base could have had; as futures come it is at both for about one pair in p^2 = 2^62. Among K
    futures that makes K^2 / 2^63 pairs, one in 10^7 packs at K = 500,000; an accident takes one negative from an anchor and does
    nothing else. Nothing stands against someone who looks for collisions.

    Args:
        input_ids: integers [T], less than 2^31 - 2.
        segment_ids: [T] document number of each token, non-decreasing.
        reach: tokens that count, that of the position itself included; 0 is all up to the end of the document. (A summary made
            by L layers with a window of k sees L k + 1 tokens.)

    Returns:
        int64 [T].
    """
    total = input_ids.numel()
    last = torch.searchsorted(segment_ids, segment_ids, side="right") - 1
    if reach:
        last = torch.minimum(last, torch.arange(reach - 1, total + reach - 1, device=last.device))
    powers, inverses = _list_powers(total, input_ids.device)
    terms = (input_ids.long() + 1) * powers % PRIME
    sums = terms.flatten().cumsum(0).view(2, total)  # exact; the second row goes on from the first, and differences do not see it
    first, second = (sums[:, last] - sums + terms) % PRIME * inverses % PRIME
    return first << 31 | second


@lru_cache(maxsize=4)
def _list_powers(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The bases to the powers 0 to count - 1, int64 [2, count], and the inverses of these."""
    powers = np.stack([_raise(base, count) for base in BASES])
    inverses = np.stack([_raise(pow(base, -1, PRIME), count) for base in BASES])
    return torch.from_numpy(powers).to(device), torch.from_numpy(inverses).to(device)


def _raise(base: int, count: int) -> np.ndarray:
    powers = np.ones(1, dtype=np.int64)
    while len(powers) < count:
        powers = np.concatenate([powers, powers * pow(base, len(powers), PRIME) % PRIME])
    return powers[:count]
