from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexmoe_jax.server import learn_norms, norm_limits, too_late
from flexmoe_jax.server.quarantine import init_norms, part_norms

learn, limit, too_long = map(jax.jit, (learn_norms, norm_limits, too_late))
# Of how many deviations of the logarithm an honest length may be off.
OUTSIDE = 5.5 * 1.4826


def known(*rounds, refused=()) -> jax.Array:
    norms = init_norms()
    for lengths in rounds:
        new = np.asarray(lengths, np.float32)
        norms = learn(norms, new, ~np.isin(np.arange(new.shape[1]), refused))
    return norms


def test_norms_of_both_parts_by_hand():
    shared, experts = {"w": np.array([3.0, 4.0])}, {"w": np.array([[1.0, 2.0], [2.0, 0.0]])}
    assert jax.jit(part_norms)(shared, experts).tolist() == [5, 3]
    assert part_norms({}, {}).tolist() == [0, 0]


def test_limits_by_hand():
    # ψ: of 1, 1.1, 1.2, 500 the lower median is 1.1; that one was refused counts for nothing.
    # The others are off 1.1 by factors of 1.1, 1, 1.09: that allows less than 10 medians.
    norms = known([[1.0, 500, 0, 1.1, 1.2], [2.0, 0, 0, 0, 0]], refused=[1])
    assert np.allclose(limit(norms, 10.0), [11, 20])
    assert np.allclose(limit(norms, 1.5)[0], 1.1 * (1.2 / 1.1) ** OUTSIDE)
    # Nothing is known of the experts, as long as nobody used one.
    assert limit(known([[1.0], [0.0]]), 10.0).tolist() == [10, np.inf]
    # Far apart, by factors of 8, 1, 8 off the median of 8.
    assert np.allclose(limit(known([[1, 8, 64], [0, 0, 0]]), 10.0)[0], 8 * 8**OUTSIDE, rtol=1e-4)


def test_limits_are_those_of_the_last_16_rounds_of_large_cohorts():
    cohort = np.linspace(0.5, 1.5, 50)
    norms = known(*[[100 * cohort, 100 * cohort]] * 16)
    assert norms.shape == (4, 256)
    assert (norms > 0).all()
    assert np.allclose(limit(norms, 10.0), 1000, rtol=0.05)
    for _ in range(7):
        norms = learn(norms, np.array([cohort, cohort], np.float32), np.ones(50, bool))
    assert np.allclose(limit(norms, 10.0), 1000, rtol=0.5)
    for _ in range(2):
        norms = learn(norms, np.array([cohort, cohort], np.float32), np.ones(50, bool))
    assert limit(norms, 10.0).max() < 20
    # Small cohorts are remembered for longer: one of 1 client is one length of 256.
    assert limit(learn(norms, np.full((2, 1), 1e6, np.float32), np.ones(1, bool)), 10.0).max() < 20


@given(
    hnp.arrays(np.float32, (6, 2, 20), elements=st.floats(0.015625, 4, width=32)),
    st.permutations(range(20)),
    # Each is another shape, which is compiled.
    st.sampled_from([0, 1, 7]),
    hnp.arrays(bool, 20),
)
def test_neither_order_nor_padding_matters(lengths, order, padding, honest):
    norms, shuffled = init_norms(), init_norms()
    places = np.argsort([*order, *range(20, 20 + padding)])
    for new in lengths:
        norms = learn(norms, new, honest)
        # Zeros are clients without a length: padding, and those whose work never arrives.
        padded = np.pad(new, ((0, 0), (0, padding)))[:, places]
        shuffled = learn(shuffled, padded, np.pad(honest, (0, padding))[places])
    assert np.array_equal(norms, shuffled)


@given(
    hnp.arrays(np.float32, (3, 2, 20), elements=st.floats(0.5, 2, width=32)),
    st.integers(1, 9),
    st.floats(100, 1e30),
)
def test_as_long_as_most_are_honest_no_honest_update_is_refused_and_long_ones_are(
    lengths, faulty, factor
):
    """Honest lengths lie within a factor of 4 of each other, so that 10 medians are the limit."""
    norms = init_norms()
    bad = np.arange(20) < faulty
    for number, new in enumerate(lengths):
        sent = np.where(bad, new * np.float32(factor), new)
        late = np.asarray(too_long(norms, sent, 10.0))
        limits = np.asarray(limit(norms, 10.0))[:, None]
        if number:
            assert not late.any()
            assert np.array_equal((sent > limits).any(axis=0), bad)
            assert (limits <= max(20, 2 * 4**OUTSIDE)).all()
        else:
            assert np.array_equal(late, bad)
        norms = learn(norms, sent, ~(late | (sent > limits).any(axis=0)))


def test_a_first_cohort_shows_too_late_who_was_too_long():
    honest = np.array([[1.0, 2, 3, 9], [1, 1, 1, 0]], np.float32)
    assert not too_long(init_norms(), honest, 10.0).any()
    long = honest.copy()
    long[1, 2] = 20.0
    assert too_long(init_norms(), long, 10.0).tolist() == [False, False, True, False]
    # Once lengths are known, each update is judged as it comes.
    assert not too_long(known([[1.0], [1.0]]), long, 10.0).any()
    # Experts may become known later than ψ.
    assert too_long(known([[1.0], [0.0]]), long, 10.0).any()


@pytest.mark.parametrize("kind", ["nobody", "all alike"])
def test_what_says_nothing_refuses_nobody(kind):
    lengths = np.full((2, 4), 0.0 if kind == "nobody" else 3.0, np.float32)
    norms = known(lengths)
    assert not too_long(init_norms(), lengths, 10.0).any()
    assert (limit(norms, 10.0) == (np.inf if kind == "nobody" else 30)).all()
    assert np.isfinite(norms).all()
    # Nor does a round of which all was refused, which leaves no spread.
    assert np.allclose(limit(known([[1.0, 2], [1, 2]], refused=[0, 1]), 10.0), 10)
