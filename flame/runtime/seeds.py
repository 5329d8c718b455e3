"""Seeds for the random draws of one packed sequence."""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(run_seed: int, sequence_index: int) -> int:
    """Derive a seed from `training.seed` and the index of a packed sequence in the run.

    So draws are the same on any number of ranks, and after a resume. The two numbers are hashed, since torch's CPU generator only
    uses the lowest 32 bits of a seed.

    Returns:
        a seed of 63 bits.
    """
    return int.from_bytes(blake2b(f"{run_seed} {sequence_index}".encode(), digest_size=8).digest()) >> 1
