from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.edge import TIERS, experts_in_memory
from flexmoe_jax.errors import InputError


def test_capacity_by_hand() -> None:
    # Momentum: 3 numbers for each parameter. Fixed: 3 · 100 + 50 = 350; an expert: 3 · 40 = 120.
    # 470 = 350 + 120 just holds 1, 709 misses 3 = 350 + 360 by a byte, and 10,000 would hold 80.
    capacity = experts_in_memory(
        np.array([470, 709, 710, 10_000, np.inf]),
        shared_bytes=100,
        expert_bytes=40,
        optimizer_copies=1,
        activation_bytes=50,
        experts=8,
    )
    assert capacity.tolist() == [1, 2, 3, 8, 8]
    assert capacity.dtype == np.int64


def test_memory_limits_sensors_and_not_phones() -> None:
    # Megabyte models: (8,388,608 - 3 · 400,000 - 1,000,000) / (3 · 600,000) = 3.4 for the sensor.
    capacity = experts_in_memory(
        np.array([tier.memory for tier in TIERS.values()]),
        shared_bytes=400_000,
        expert_bytes=600_000,
        optimizer_copies=1,
        activation_bytes=1_000_000,
        experts=8,
    )
    assert capacity.tolist() == [3, 8, 8]


SIZES = st.integers(1, 10**7)


@given(SIZES, SIZES, st.integers(0, 2), SIZES, st.integers(1, 64), st.integers(0, 10**9))
def test_what_is_held_fits_and_one_more_does_not(
    shared: int, expert: int, copies: int, activations: int, experts: int, spare: int
) -> None:
    def needed(k: int) -> int:
        return (2 + copies) * (shared + k * expert) + activations

    memory = needed(1) + spare
    (held,) = experts_in_memory(
        np.array([memory]),
        shared_bytes=shared,
        expert_bytes=expert,
        optimizer_copies=copies,
        activation_bytes=activations,
        experts=experts,
    )
    assert needed(held) <= memory
    assert held == experts or needed(held + 1) > memory


def test_a_client_too_small_is_named_with_its_need() -> None:
    with pytest.raises(InputError) as caught:
        experts_in_memory(
            np.array([900.0, 469.0, 20.0]),
            shared_bytes=100,
            expert_bytes=40,
            optimizer_copies=1,
            activation_bytes=50,
            experts=8,
            tiers=["phone", "sensor", "sensor"],
        )
    assert str(caught.value) == (
        "edge.memory=469: client 1 (sensor), as 2 clients in all, needs 470 bytes to train one "
        "expert; give it more memory, or shrink the model or local.batch_size"
    )


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"expert_bytes": 0}, "expert_bytes"),
        ({"experts": 0}, "model.experts"),
        ({"activation_bytes": 10**9}, "edge.memory"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], field: str) -> None:
    given_sizes = {
        "shared_bytes": 1,
        "expert_bytes": 1,
        "optimizer_copies": 0,
        "activation_bytes": 1,
        "experts": 2,
    }
    with pytest.raises(InputError) as caught:
        experts_in_memory(np.array([100.0]), **(given_sizes | sizes))
    assert caught.value.field == field
