from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.edge import TIERS, deal_devices, parse_mix
from flexmoe_jax.errors import InputError


@pytest.mark.parametrize(
    ("mix", "clients", "counts"),
    [
        # 10 · (2, 1, 1) / 4 = 5, 2.5, 2.5: of equal remainders the first takes the one left.
        ({"sensor": 2, "phone": 1, "gateway": 1}, 10, [5, 3, 2]),
        # 7 · (0.5, 0.3, 0.2) = 3.5, 2.1, 1.4: the largest remainder is the first's.
        ({"gateway": 0.5, "sensor": 0.3, "phone": 0.2}, 7, [4, 2, 1]),
        # A share of 0.1 is not exact in binary, and 10 · 0.1 must still be 1.
        ({"sensor": 0.1, "phone": 0.2, "gateway": 0.7}, 10, [1, 2, 7]),
        ({"sensor": 0, "phone": 3}, 5, [0, 5]),
        ({"sensor": 1, "phone": 1}, 1, [1, 0]),
    ],
)
def test_counts_by_hand(mix: dict[str, float], clients: int, counts: list[int]) -> None:
    devices = deal_devices(mix, clients, seed=0)
    assert np.bincount(devices.tier, minlength=len(mix)).tolist() == counts


@given(
    st.lists(st.floats(0, 1e6), min_size=3, max_size=3).filter(lambda mix: sum(mix) > 0),
    st.integers(1, 200),
    st.integers(0, 2**32),
)
def test_every_count_is_its_quota_rounded(weights: list[float], clients: int, seed: int) -> None:
    mix = dict(zip(TIERS, weights, strict=True))
    devices = deal_devices(mix, clients, seed)
    quota = clients * (np.array(weights) / sum(weights))
    assert (np.abs(np.bincount(devices.tier, minlength=3) - quota) < 1 + 1e-6).all()
    assert len(devices.tier) == clients


def test_figures_are_those_of_the_tier() -> None:
    devices = deal_devices({"gateway": 1, "sensor": 1}, 6, seed=3)
    for client, name in enumerate(devices.tiers):
        row = (name, *(column[client] for column in devices[2:]))
        assert row == TIERS[name]


def test_the_seed_decides_the_order() -> None:
    one, again, other = (deal_devices({"sensor": 1, "phone": 1}, 40, seed) for seed in (0, 0, 1))
    assert np.array_equal(one.tier, again.tier)
    assert not np.array_equal(one.tier, other.tier)


@pytest.mark.parametrize(
    ("mix", "clients", "line"),
    [
        (
            {"phoen": 1},
            3,
            "edge.mix=phoen: no such tier; did you mean phone? choose among sensor, phone, gateway",
        ),
        ({"phone": -1}, 3, "edge.mix=phone:-1: give a finite weight of at least 0"),
        ({"phone": np.inf}, 3, "edge.mix=phone:inf: give a finite weight of at least 0"),
        ({"phone": 0}, 3, "edge.mix={'phone': 0}: give at least one tier a weight above 0"),
        ({}, 3, "edge.mix={}: give at least one tier a weight above 0"),
        ({"phone": 1}, 0, "clients.count=0: give at least 1"),
    ],
)
def test_bad_mixes_are_refused(mix: dict[str, float], clients: int, line: str) -> None:
    with pytest.raises(InputError) as caught:
        deal_devices(mix, clients, seed=0)
    assert str(caught.value) == line


def test_a_mix_is_read_from_text() -> None:
    mix = parse_mix("sensor:2, phone : 0.5,gateway")
    assert mix == {"sensor": 2, "phone": 0.5, "gateway": 1}
    assert list(mix) == ["sensor", "phone", "gateway"]


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "a tier has no name"),
        ("sensor:2,", "a tier has no name"),
        (":2", "a tier has no name"),
        ("sensor:two", "'two' is no weight"),
        ("sensor:", "'' is no weight"),
        ("sensor=2", None),
        ("sensor:1,sensor:2", "give sensor once, with its whole weight"),
    ],
)
def test_unreadable_mixes_are_refused(text: str, remedy: str | None) -> None:
    with pytest.raises(InputError, match=remedy or "no such tier"):
        deal_devices(parse_mix(text), 3, seed=0)


def test_weights_whose_sum_is_infinite_are_shares() -> None:
    devices = deal_devices({"sensor": 1e308, "phone": 1e308, "gateway": 0.0}, 10, seed=0)
    assert np.bincount(devices.tier).tolist() == [5, 5]
