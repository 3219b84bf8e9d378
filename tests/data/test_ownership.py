from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.data.ownership import (
    Holdings,
    deal,
    ensure_minimum,
    floors_for_minimum,
    holdings_of,
    parts_of,
    reweigh,
)


def test_parts_of_by_hand() -> None:
    parts = parts_of(np.array([2, 0, 2, 0]), 4)
    assert [part.tolist() for part in parts] == [[1, 3], [], [0, 2], []]


def test_holdings_and_deal_are_inverse() -> None:
    label = np.array([0, 0, 1, 1, 1, 2])
    parts = [np.array([0, 2, 3]), np.array([1, 4, 5])]
    held = holdings_of(parts, label, 3)
    assert held.client.tolist() == [0, 0, 1, 1, 1]
    assert held.label.tolist() == [0, 1, 0, 1, 2]
    assert held.examples.tolist() == [1, 2, 1, 1, 1]
    owner = deal(held, label, np.random.default_rng(3))
    again = holdings_of(parts_of(owner, 2), label, 3)
    assert all(np.array_equal(one, two) for one, two in zip(held, again, strict=True))


def test_minimum_takes_from_the_largest_alone() -> None:
    owner = np.repeat([0, 1, 2, 3], [0, 5, 20, 30])
    moved = ensure_minimum(owner, 4, 4, np.random.default_rng(0))
    # Client 0 needs 4; reducing client 3 to 26 provides them, and no other client changes.
    assert np.bincount(moved).tolist() == [4, 5, 20, 26]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.data())
def test_minimum_is_reached_and_donors_stay_above_it(sizes: list[int], data: st.DataObject) -> None:
    size = np.array(sizes)
    minimum = data.draw(st.integers(0, int(size.sum()) // len(size)))
    owner = np.repeat(np.arange(len(size)), size)
    moved = ensure_minimum(owner, len(size), minimum, np.random.default_rng(0))
    after = np.bincount(moved, minlength=len(size))
    assert after.min() >= minimum
    assert (after[size < minimum] == minimum).all()
    cut = after < size
    if cut.any():
        assert after.max() <= after[cut].min() + 1


def test_floors_need_a_chain_of_moves() -> None:
    # Client 0 holds class 0 alone, client 1 both. Class 0 has 6 examples, class 1 has 5. To give
    # both 5, client 0 takes 5 of class 0, so that client 1 makes do with 1 + 4.
    held = Holdings(np.array([0, 1, 1]), np.array([0, 0, 1]), np.array([3, 3, 5]))
    floor = floors_for_minimum(held, 5)
    assert floor is not None
    assert floor.tolist() == [5, 1, 4]
    assert floors_for_minimum(held, 6) is None


def test_reweigh_by_hand() -> None:
    # One class of 60, clients equal at 20: weights 1 : 2 : 3 give 10, 20, 30.
    held = Holdings(np.arange(3), np.zeros(3, np.int64), np.full(3, 20))
    weight = np.array([1.0, 2.0, 3.0])
    assert reweigh(held, weight, 1).examples.tolist() == [10, 20, 30]
    # At least 15 each: client 0 is held there and the other 45 divide as 2 : 3.
    assert reweigh(held, weight, 15).examples.tolist() == [15, 18, 27]
