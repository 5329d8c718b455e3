"""The model of communication, against sums by hand."""

from __future__ import annotations

import pytest

from benchmarks.communication import Links, Step, estimate_parts

LINKS = Links(nvlink=100.0, network=10.0, latency=0.0)
STEP = Step(passes=(20.0, 20.0), backward=60.0, rest=5.0, layers=2, layer_weights=500_000_000, root_weights=100_000_000)


def test_one_gpu_communicates_nothing():
    assert estimate_parts(STEP, 1, 1, LINKS) == (0.0, 0.0)


def test_communication_that_fits_is_hidden_and_the_rest_shows():
    """A gather of a layer takes 5 ms and its reduction 10 ms, those of the root 1 and 2 ms."""
    shown, hidden = estimate_parts(STEP, 2, 1, LINKS)
    assert shown == pytest.approx(1 + 2 + 5 + 10) and hidden == pytest.approx(5 + 5 + 15)
    short = STEP._replace(passes=(6.0, 6.0), backward=12.0)  # 3, 3 and 6 ms a layer
    shown, hidden = estimate_parts(short, 2, 1, LINKS)
    assert shown == pytest.approx(18 + 2 + 2 + 9) and hidden == pytest.approx(3 + 3 + 6)


def test_groups_reduce_their_shards_over_the_network():
    """2 groups of 2: the shard of a layer is 1 GB in float32, and takes 100 ms there; that of the root takes 20."""
    alone, grouped = (sum(estimate_parts(STEP, 2, groups, LINKS)) for groups in (1, 2))
    assert grouped - alone == pytest.approx(20 + 2 * 100)


def test_a_ring_has_steps():
    slow = LINKS._replace(latency=1000.0)
    fast, stepped = (sum(estimate_parts(STEP, 4, 1, links)) for links in (LINKS, slow))
    assert stepped - fast == pytest.approx(3 * (2 + 2 + 4))  # root, last layer, and three gathers and a reduction that may hide
