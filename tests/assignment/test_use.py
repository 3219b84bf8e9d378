from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.assignment import split_use
from flexmoe_jax.errors import InputError


def test_use_by_hand():
    # Two clients hold both experts. Each prefers another one by log 3: 3 parts to 1.
    both = np.ones((2, 2), bool)
    preference = np.log([[3.0, 1.0], [1.0, 3.0]])
    assert split_use(preference, both) == pytest.approx(np.array([[3, 1], [1, 3]]) / 4)
    # Both prefer expert 0, one by log 9: totals stay even, so the other gives it less than half.
    # With odds of 9 : 1 between them, (0.75, 0.25) and (0.25, 0.75) have odds 3 and 1/3.
    odd = split_use(np.log([[9.0, 1.0], [1.0, 1.0]]), both)
    assert odd == pytest.approx(np.array([[0.75, 0.25], [0.25, 0.75]]), abs=1e-3)
    # No preference, and a client that holds one expert: nothing to choose.
    some = np.array([[True, True, False], [False, True, False], [False, False, False]])
    assert split_use(np.zeros((3, 3)), some).tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 0]]
    # Held by that client alone, expert 0 gets what an even split gives it, whatever is preferred.
    alone = split_use([[5.0, 0, 0], [0, 0, 0], [0, 0, 0]], some)
    assert alone == pytest.approx(np.array([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 0]]), abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), clients=st.integers(1, 12), experts=st.integers(1, 6))
def test_every_expert_gets_what_an_even_split_would_give_it(seed, clients, experts):
    rng = np.random.default_rng(seed)
    assignment = rng.random((clients, experts)) < 0.6
    work = rng.integers(1, 50, clients)
    preference = rng.normal(size=(clients, experts))
    use = split_use(preference, assignment, work)
    held = assignment.sum(axis=1)
    assert (use[~assignment] == 0).all()
    assert (use[assignment] > 0).all()
    assert use.sum(axis=1) == pytest.approx((held > 0).astype(float))
    even = assignment / np.maximum(held, 1)[:, None]
    total = work @ even
    assert work @ use == pytest.approx(total, abs=2e-4 * total.max(initial=0))
    # The order of the clients changes nothing, nor does what a client adds to all its preferences.
    order = rng.permutation(clients)
    moved = (preference + rng.normal(size=(clients, 1)))[order]
    assert split_use(moved, assignment[order], work[order]) == pytest.approx(use[order], abs=1e-6)


def test_input_that_fits_no_assignment_is_refused():
    both = np.ones((2, 2), bool)
    with pytest.raises(InputError, match=r"^preference=\(2, 3\): give one of each pair: \(2, 2\)"):
        split_use(np.zeros((2, 3)), both)
    with pytest.raises(InputError, match=r"^preference=not finite"):
        split_use([[0.0, np.nan], [0, 0]], both)
    with pytest.raises(InputError, match=r"^work=\(3,\): give one number of each client: \(2,\)"):
        split_use(np.zeros((2, 2)), both, np.ones(3))
    with pytest.raises(InputError, match=r"^work=negative or not finite"):
        split_use(np.zeros((2, 2)), both, [1.0, -1.0])


def test_parts_sum_to_one_however_strong_the_preferences():
    # All prefer expert 0 by more than a float can tell: totals hold, so each gives it a half.
    use = split_use(np.tile([1e6, 0.0], (3, 1)), np.ones((3, 2), bool))
    assert use == pytest.approx(np.full((3, 2), 0.5), abs=1e-3)
    # No 200 steps bring these totals near; the parts are parts all the same.
    rng = np.random.default_rng(0)
    strong = 1e3 * rng.normal(size=(40, 8))
    assert split_use(strong, rng.random((40, 8)) < 0.5).sum(axis=1) == pytest.approx(np.ones(40))
