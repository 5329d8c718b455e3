from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flame.data.order import shuffled_index

seeds = st.integers(0, 2**70)
epochs = st.integers(0, 10**6)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 150), seed=seeds, epoch=epochs)
def test_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled_index(position, n, seed, epoch) for position in range(n)) == list(range(n))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(10**9, 10**13), seed=seeds, epoch=epochs)
def test_large_corpora_stay_in_range_without_collisions(n: int, seed: int, epoch: int) -> None:
    positions = [*range(50), *range(n - 50, n)]
    found = {shuffled_index(position, n, seed, epoch) for position in positions}
    assert len(found) == len(positions)
    assert all(0 <= index < n for index in found)


def test_differs_between_epochs_and_seeds() -> None:
    keys = [(seed, epoch) for seed in range(10) for epoch in range(10)]
    orders = {tuple(shuffled_index(position, 50, seed, epoch) for position in range(50)) for seed, epoch in keys}
    assert len(orders) == len(keys)


def test_every_position_and_every_step_is_uniform() -> None:
    """Chi-square against the uniform law, at three times its expectation, for one position and for the step to the next."""
    n, draws = 23, 2300
    for position in (0, 11, 21):
        first = [shuffled_index(position, n, 7, epoch) for epoch in range(draws)]
        second = [shuffled_index(position + 1, n, 7, epoch) for epoch in range(draws)]
        steps = [(b - a) % n for a, b in zip(first, second, strict=True)]
        for values, outcomes in ((first, range(n)), (steps, range(1, n))):
            expected = draws / len(outcomes)
            chi_square = sum((values.count(outcome) - expected) ** 2 / expected for outcome in outcomes)
            assert chi_square < 3 * (len(outcomes) - 1)
            assert sum(values.count(outcome) for outcome in outcomes) == draws
