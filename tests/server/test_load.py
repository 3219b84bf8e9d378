from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.errors import InputError
from flexmoe_jax.server import LOAD_MODELS, make_load_model

NOTHING = np.zeros((2, 4)), np.zeros((2, 4), int)


def test_clients_and_samples():
    cohort, examples = np.array([0, 2]), np.array([10, 20, 30, 0, 0, 0, 0])
    capacity = np.full(7, 2)
    assert make_load_model("clients", examples, capacity).weigh(cohort, *NOTHING) == 1.0
    samples = make_load_model("samples", examples, capacity)
    assert samples.weigh(cohort, *NOTHING).tolist() == [10, 30]


def test_usage_by_hand():
    # Client 0 held experts 0 and 1 twice, and routed 50 and 30 examples to them in all: 25 and 15 a
    # round. What it never held is predicted at an even split of its 40 examples over k = 2: 20.
    usage, rounds = np.array([[50, 30.0, 0, 0]]), np.array([[2, 2, 0, 0]])
    cohort, examples, capacity = np.array([0]), np.full(7, 40), np.full(7, 2)
    model = make_load_model("usage", examples, capacity)
    assert model.weigh(cohort, usage, rounds).tolist() == [[25, 15, 20, 20]]
    # Texts of ten tokens: an even split counts tokens, too.
    assert model.weigh(cohort, 10 * usage, rounds).tolist() == [[250, 150, 200, 200]]
    # With two experts an example, both of the two get all 40; with three, too.
    usage = np.array([[80.0, 80, 0, 0]])
    for top_k in (2, 3):
        model = make_load_model("usage", examples, capacity, top_k)
        assert model.weigh(cohort, usage, rounds).tolist() == [[40, 40, 40, 40]]


def test_unknown_model_is_refused():
    with pytest.raises(InputError, match=r"assignment\.load=bytes: choose one of clients, samples"):
        make_load_model("bytes", np.ones(1), np.ones(1))


def test_only_holders_that_weigh_1_are_equal():
    models = {name: make_load_model(name, np.ones(1), np.ones(1)) for name in LOAD_MODELS}
    assert {name: model.equal for name, model in models.items()} == {
        "clients": True,
        "samples": False,
        "usage": False,
    }


def test_what_each_pair_gave_by_hand():
    # The second client's update never arrived, or was refused: it counts for nothing.
    slots, examples = jnp.array([[0, 1], [0, 3]]), jnp.array([40.0, 0.0])
    usage = jnp.array([[30.0, 10.0], [0.0, 0.0]])
    settled = {
        name: make_load_model(name, np.ones(1), np.ones(1)).measure(slots, examples, usage).tolist()
        for name in LOAD_MODELS
    }
    assert settled == {
        "clients": [[1, 1], [0, 0]],
        "samples": [[40, 40], [0, 0]],
        "usage": [[30, 10], [0, 0]],
    }
