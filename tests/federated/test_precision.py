"""JAX's switches for double precision leave the rounds in single precision, as they were."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import optax
import pytest

from flexmoe_jax import data, federated, models
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.federated import chunk_test_set
from tests.federated.conftest import CAPACITY

OPTIONS = {
    "as it is": {},
    "everything": {
        "local": federated.LocalTraining(
            optax.adam(0.01, mu_dtype=None),
            batch_size=8,
            balance=0.1,
            z=0.01,
            augment=data.crop_flip,
            decay=optax.linear_schedule(1.0, 0.0, 5),
        ),
        "fitness": federated.FitnessOptions(federated.make_score("loss", 1.0)),
        "server": optax.adam(0.1),
        "ownership": models.Ownership(("head",), shared_gate=True),
        "uplink": federated.Uplink(federated.make_compressor("int8"), clip=1.0),
        "load_model": federated.make_load_model("usage", 10 * CAPACITY, CAPACITY),
        "deficit_decay": 0.9,
    },
    "sparse": {"uplink": federated.Uplink(federated.make_compressor("top_k"), norm_limit=10.0)},
    "private": {"uplink": federated.Uplink(clip=1.0, noise_multiplier=0.1, simulated_noise=True)},
    "robust": {"aggregator": partial(federated.trimmed_mean, trim=0.1)},
}


def run(make_algorithm, clients, digits, options):
    """The state and figures after a round."""
    algorithm = make_algorithm(block_size=2, **options)
    state = algorithm.init(jax.random.key(0))
    kinds = jax.tree.map(lambda leaf: leaf.dtype, state)
    cohort = np.arange(7)
    plan = algorithm.plan(cohort, algorithm.assign(state, cohort))
    state, report = algorithm.round(state, clients, plan)
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == kinds
    test = chunk_test_set(digits.test_images[:40], digits.test_labels[:40], 20)
    return state, report, algorithm.evaluate(state, test, clients.label_share)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_round_is_the_same_in_double_precision_mode(make_algorithm, clients, digits, name):
    single = run(make_algorithm, clients, digits, OPTIONS[name])
    with jax.enable_x64():
        double = run(make_algorithm, clients, digits, OPTIONS[name])
    for one, other in zip(jax.tree.leaves(single), jax.tree.leaves(double), strict=True):
        assert one.dtype == other.dtype
        if not jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            assert np.allclose(one, other, atol=2e-4)


def test_rounds_on_the_device_are_too(make_algorithm, clients):
    policy = make_policy("flex", exploration=0.5)
    algorithm = make_algorithm(policy=policy)
    rounds = federated.run_on_device(algorithm, 2, per_round=5)
    single, _ = rounds(algorithm.init(jax.random.key(0)), clients)
    with jax.enable_x64():
        double, _ = rounds(algorithm.init(jax.random.key(0)), clients)
    assert jax.tree.map(lambda x: x.dtype, single) == jax.tree.map(lambda x: x.dtype, double)
    assert np.array_equal(single.slots, double.slots)
