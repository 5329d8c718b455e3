"""Draws by counters, against SplitMix64 in Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flame.runtime.draws import draw_integers

MASK = (1 << 64) - 1


def mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def test_the_output_function_is_that_of_splitmix64() -> None:
    """The first outputs for seed 1234567: rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64."""
    state, gamma = 1234567, 0x9E3779B97F4A7C15
    assert [mix(state + (step + 1) * gamma & MASK) for step in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(1, 50))
def test_draws_are_those_of_plain_integers(run_seed: int, number: int, count: int) -> None:
    gamma = 0x9E3779B97F4A7C15
    state = mix(mix((number + run_seed * gamma) & MASK) + gamma & MASK)
    expected = [mix((state + step * gamma) & MASK) >> 2 for step in range(1, count + 1)]
    assert draw_integers(run_seed, torch.tensor(number), count).tolist() == expected


def test_draws_are_uniform_and_differ_between_sequences() -> None:
    draws = torch.stack([draw_integers(7, torch.tensor(number), 4096) for number in range(16)])
    shares = draws.double() / 2.0**62
    assert len(draws.unique()) == draws.numel()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.005)
    assert torch.histc(shares.float(), 16, 0.0, 1.0).sub(4096).abs().max() < 4 * 64  # four standard deviations of a count
    assert torch.corrcoef(shares).fill_diagonal_(0).abs().max() < 0.08
