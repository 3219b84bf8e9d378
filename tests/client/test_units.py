from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax import tasks
from flexmoe_jax.client.units import fractions, weights_of
from flexmoe_jax.errors import InputError

parts = jax.jit(fractions)


def one_hot(experts, count=2):
    return np.asarray(experts)[..., None] == np.arange(count)


def test_a_unit_goes_whole_where_the_layer_routes_units():
    # Two texts of three tokens; the last token is padding.
    selected = one_hot([[0, 1, 1], [1, 0, 0]])
    weight = jnp.array([[1.0, 1, 1], [1, 1, 0]])
    found = fractions(jnp.asarray(selected), weight)
    assert found.tolist() == [[1, 0], [0, 1], [0, 1], [0, 1], [1, 0], [0, 0]]


def test_a_unit_is_routed_in_parts_where_the_layer_routes_what_is_finer():
    # A picture of 2 x 2 pixels, three of which go to expert 0, and one whose pixels all go to 1.
    selected = one_hot([[[0, 0], [0, 1]], [[1, 1], [1, 1]]])
    found = fractions(jnp.asarray(selected), jnp.array([1.0, 0.5]))
    assert found.tolist() == [[0.75, 0.25], [0, 0.5]]
    # Behind the axis of tokens, the same of each token.
    tokens = jnp.asarray(selected)[None]
    assert fractions(tokens, jnp.array([[1.0, 0.5]])).tolist() == found.tolist()


def test_all_units_of_an_example_go_the_same_way_where_the_layer_routes_examples():
    weight = jnp.array([[1.0, 1.0], [1.0, 0.0]])
    found = fractions(jnp.asarray(one_hot([0, 1])), weight)
    assert found.tolist() == [[1, 0], [1, 0], [0, 1], [0, 0]]


def test_axes_of_neither_kind_are_refused():
    line = r"model=MoE layer: what it routes has axes \(4,\), the task's units \(3,\)"
    with pytest.raises(InputError, match=line):
        fractions(jnp.ones((2, 4, 5), bool), jnp.ones((2, 3)))


@given(
    st.integers(1, 3),
    st.lists(st.integers(1, 3), max_size=3),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_every_unit_is_counted_once_for_each_expert_chosen(batch, axes, routed, units, top, seed):
    """For any routing, the units of all experts add up to the weight of the units."""
    rng = np.random.default_rng(seed)
    weight = rng.random((batch, *axes[:units])).astype(np.float32)
    scores = rng.random((batch, *axes[:routed], 4))
    selected = np.argsort(np.argsort(-scores, axis=-1), axis=-1) < top
    share = np.asarray(parts(selected, weight))
    assert share.shape == (weight.size, 4)
    assert np.allclose(share.sum(axis=1), top * weight.ravel(), rtol=1e-5)
    assert np.allclose(share.sum(), top * weight.sum(), rtol=1e-5)


def test_padding_counts_nothing_whether_a_row_or_a_token():
    batch = {"tokens": jnp.array([[5, 6, -1], [7, -1, -1], [1, 2, 3]])}
    weight = weights_of(tasks.next_token(), batch, jnp.array([1.0, 1.0, 0.0]))
    assert weight.tolist() == [[1, 0], [0, 0], [0, 0]]
