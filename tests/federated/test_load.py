from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flexmoe_jax.federated import LOAD_MODELS, make_load_model

from flexmoe_jax.errors import InputError


@pytest.fixture(scope="module")
def state(make_algorithm):
    return make_algorithm().init(jax.random.key(0))


def test_clients_and_samples(state):
    cohort, examples = np.array([0, 2]), np.array([10, 20, 30, 0, 0, 0, 0])
    capacity = np.full(7, 2)
    assert make_load_model("clients", examples, capacity).weigh(state, cohort) == 1.0
    assert make_load_model("samples", examples, capacity).weigh(state, cohort).tolist() == [10, 30]


def test_usage_by_hand(state):
    # Client 0 held expert 1 twice and routed 30 examples to it in all: 15 a round. What it never
    # held is predicted at an even split of its 40 examples over k = 2: 20.
    state = state._replace(
        usage=state.usage.at[0, 1].set(30.0),
        held_rounds=jnp.zeros((7, 4), jnp.int32).at[0, 1].set(2),
    )
    model = make_load_model("usage", np.full(7, 40), np.full(7, 2))
    assert model.weigh(state, np.array([0])).tolist() == [[20, 15, 20, 20]]
    # With two experts an example, both of the two get all 40; with three, too.
    for top_k in (2, 3):
        model = make_load_model("usage", np.full(7, 40), np.full(7, 2), top_k)
        assert model.weigh(state, np.array([0])).tolist() == [[40, 15, 40, 40]]


def test_unknown_model_is_refused():
    with pytest.raises(InputError, match=r"assignment\.load=bytes: choose one of clients, samples"):
        make_load_model("bytes", np.ones(1), np.ones(1))


def test_what_each_pair_gave_by_hand():
    # The second client's update never arrived, or was refused: it gave nothing.
    slots, examples = jnp.array([[0, 1], [0, 3]]), jnp.array([40.0, 0.0])
    usage = jnp.array([[30.0, 10.0], [0.0, 0.0]])
    settled = {
        name: make_load_model(name, np.ones(1), np.ones(1)).settle(slots, examples, usage).tolist()
        for name in LOAD_MODELS
    }
    assert settled == {
        "clients": [[1, 1], [0, 0]],
        "samples": [[40, 40], [0, 0]],
        "usage": [[30, 10], [0, 0]],
    }
