from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.data.apportion import apportion, fill


@pytest.mark.parametrize(
    ("total", "weight", "floor", "expected"),
    [
        # 10 · (1, 2, 3) / 6 = 1.67, 3.33, 5: the largest remainder takes the one that is left.
        (10, [1.0, 2.0, 3.0], None, [2, 3, 5]),
        # Equal remainders (7/3 = 2.33 each): the first takes it.
        (7, [1.0, 1.0, 1.0], None, [3, 2, 2]),
        # λ = 1 would give the first 1 < 4, so it gets 4 and the other two share 6 as 2 : 3.
        (10, [1.0, 2.0, 3.0], [4, 0, 0], [4, 2, 4]),
        # The floors use up everything.
        (6, [9.0, 1.0], [1, 5], [1, 5]),
        (0, [1.0, 2.0], None, [0, 0]),
    ],
)
def test_apportion_by_hand(
    total: int, weight: list[float], floor: list[int] | None, expected: list[int]
) -> None:
    given_floor = None if floor is None else np.array(floor)
    assert apportion(total, np.array(weight), given_floor).tolist() == expected


@given(
    st.lists(
        st.tuples(st.floats(1e-6, 1e6), st.integers(0, 50)),
        min_size=1,
        max_size=20,
    ),
    st.integers(0, 5000),
)
def test_apportion_reaches_the_total_above_the_floors(
    rows: list[tuple[float, int]], spare: int
) -> None:
    weight = np.array([row[0] for row in rows])
    floor = np.array([row[1] for row in rows])
    shares = apportion(int(floor.sum()) + spare, weight, floor)
    assert shares.sum() == floor.sum() + spare
    assert (shares >= floor).all()
    # Above its floor (beyond rounding), no client has more per weight than another could have.
    above = shares > floor + 1
    if above.any():
        level = ((shares - 1) / weight)[above].max()
        assert (shares + 1 >= level * weight * (1 - 1e-9)).all()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=15), st.data())
def test_fill_is_as_even_as_the_limits_allow(limits: list[int], data: st.DataObject) -> None:
    limit = np.array(limits)
    total = data.draw(st.integers(0, int(limit.sum())))
    filled = fill(limit, total, np.random.default_rng(0))
    assert filled.sum() == total
    assert (filled <= limit).all()
    assert (filled >= 0).all()
    with_room = filled < limit
    if with_room.any():
        assert filled.max() <= filled[with_room].min() + 1


def test_fill_by_hand() -> None:
    # Level 3: min((1, 3, 9, 9), 3) = 1 + 3 + 3 + 3 = 10.
    assert fill(np.array([1, 3, 9, 9]), 10, np.random.default_rng(0)).tolist() == [1, 3, 3, 3]
