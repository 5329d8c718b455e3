"""Seeds of what is drawn for one packed sequence."""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(run_seed: int, sequence_index: int) -> int:
    """A seed from `training.seed` and the number of a packed sequence in the run: what is drawn with it is the same on any number
    of ranks, and after a resume.

    Torch's CPU generator looks at the lowest 32 bits of a seed alone, so both have to be in there.

    Returns:
        63 bits.
    """
    return int.from_bytes(blake2b(f"{run_seed} {sequence_index}".encode(), digest_size=8).digest()) >> 1
