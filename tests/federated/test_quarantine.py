from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexmoe_jax.federated.quarantine import (
    init_norms,
    learn_norms,
    norm_limits,
    part_norms,
    too_late,
)

learn, limit, late = map(jax.jit, (learn_norms, norm_limits, too_late))
# Of how many deviations of the logarithm an honest length may be off.
OUTSIDE = 5.5 * 1.4826


def known(*rounds) -> jax.Array:
    norms = init_norms()
    for lengths in rounds:
        norms = learn(norms, jnp.asarray(lengths, jnp.float32))
    return norms


def test_norms_of_both_parts_by_hand():
    shared, experts = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([[1.0, 2.0], [2.0, 0.0]])}
    assert part_norms(shared, experts).tolist() == [5, 3]
    assert part_norms({}, {}).tolist() == [0, 0]


def test_limits_by_hand():
    # ψ: of 1, 1.1, 1.2, 500 the lower median is 1.1; that client 4 was refused counts for nothing.
    # Its factors off 1.1 are 1.1, 1, 1.09, 455: the lower median 1.0909 leaves 10 medians as limit.
    norms = known([[1.0, 500, 0, 1.1, 1.2], [2.0, 0, 0, 0, 0]])
    assert np.allclose(limit(norms, 10.0), [11, 20])
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
        norms = learn(norms, jnp.asarray([cohort, cohort], jnp.float32))
    assert np.allclose(limit(norms, 10.0), 1000, rtol=0.5)
    for _ in range(2):
        norms = learn(norms, jnp.asarray([cohort, cohort], jnp.float32))
    assert limit(norms, 10.0).max() < 20
    # Small cohorts are remembered for longer: one of 1 client is one length of 256.
    assert limit(learn(norms, jnp.full((2, 1), 1e6)), 10.0).max() < 20


@given(
    hnp.arrays(np.float32, (6, 2, 20), elements=st.floats(0.015625, 4, width=32)),
    st.permutations(range(20)),
    st.integers(0, 7),
)
def test_neither_order_nor_padding_matters(lengths, order, padding):
    norms, shuffled = init_norms(), init_norms()
    for new in lengths:
        norms = learn(norms, new)
        # Zeros are clients without a length: padding, and those whose work never arrives.
        padded = np.pad(new, ((0, 0), (0, padding)))[
            :, np.argsort([*order, *range(20, 20 + padding)])
        ]
        shuffled = learn_norms(shuffled, padded)
    assert np.array_equal(norms, shuffled)


@given(
    hnp.arrays(np.float32, (3, 2, 20), elements=st.floats(0.5, 2, width=32)),
    st.integers(1, 9),
    st.floats(20, 1e30),
)
def test_as_long_as_most_are_honest_no_honest_update_is_refused_and_long_ones_are(
    lengths, faulty, factor
):
    norms = init_norms()
    for number, new in enumerate(lengths):
        sent = np.concatenate([new[:, :faulty] * np.float32(factor), new[:, faulty:]], axis=1)
        limits = limit(norms, 10.0)
        if number:
            assert (new <= limits[:, None]).all()
            # The median is an honest one's, and so is its distance to the others.
            assert (limits <= 2 * max(10, 4**OUTSIDE)).all()
        elif factor >= 1e6:
            assert late(norms, sent, np.ones(20, bool), 10.0)
        assert not late(known(new), sent, np.ones(20, bool), 10.0)
        norms = learn(norms, sent)


def test_a_first_cohort_that_cannot_be_told_apart_is_refused_as_a_whole():
    nothing, everybody = init_norms(), jnp.ones(4, bool)
    honest = jnp.array([[1.0, 2, 3, 9], [1, 1, 1, 0]])
    assert not late(nothing, honest, everybody, 10.0)
    long = honest.at[1, 2].set(20.0)
    assert late(nothing, long, everybody, 10.0)
    # What was refused on its way does no harm, and what was known makes it too late for nothing.
    assert not late(nothing, long, everybody.at[2].set(False), 10.0)
    assert not late(known([[1.0], [1.0]]), long, everybody, 10.0)
    # Experts may become known later than ψ.
    assert late(known([[1.0], [0.0]]), long, everybody, 10.0)


@pytest.mark.parametrize("kind", ["nobody", "all alike"])
def test_what_says_nothing_refuses_nobody(kind):
    lengths = jnp.full((2, 4), 0.0 if kind == "nobody" else 3.0)
    norms = learn(init_norms(), lengths)
    assert not late(init_norms(), lengths, jnp.ones(4, bool), 10.0)
    assert (limit(norms, 10.0) == (np.inf if kind == "nobody" else 30)).all()
    assert np.isfinite(norms).all()
