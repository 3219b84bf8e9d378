"""JAX's switches for double precision leave the rounds in single precision, as they were."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from flexmoe_jax import models
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.client import Codec, LocalTraining, make_compressor
from flexmoe_jax.server import (
    Admission,
    FitnessOptions,
    geometric_median,
    make_load_model,
)
from flexmoe_jax.simulation import chunk_test_set, run_on_device
from tests.conftest import CAPACITY
from tests.simulation.conftest import DEEP, strictly
from tests.simulation.test_rounds import crop_flip_images

OPTIONS = {
    "everything": {
        "local": LocalTraining(
            optax.adam(0.01, mu_dtype=None),
            batch_size=8,
            balance=0.1,
            z=0.01,
            prior=1.0,
            augment=crop_flip_images,
            decay=optax.linear_schedule(1.0, 0.0, 5),
        ),
        "fitness": FitnessOptions("loss"),
        "optimizer": optax.adam(0.1),
        "ownership": models.Ownership(("head",), shared_gate=True),
        "codec": Codec(make_compressor("int8")),
        "admission": Admission(clip=1.0, noise_multiplier=0.1, noise="simulated"),
        "load": make_load_model("usage", 10 * CAPACITY, CAPACITY),
        "deficit_decay": 0.9,
        "prior": True,
    },
    "sparse, robust and layer by layer": {
        "codec": Codec(make_compressor("top_k")),
        "admission": Admission(norm_limit=10.0),
        "aggregator": geometric_median(),
        "model": DEEP,
        "layers": "each",
        "ownership": models.Ownership(shared_gate=True),
        "local": LocalTraining(optax.sgd(0.1), batch_size=16, balance=0.0, tile=4),
    },
}


def run(make_simulation, clients, digits, options):
    """The state and figures after a round."""
    simulated = make_simulation(block_size=2, **options)
    state = simulated.init(jax.random.key(0))
    kinds = jax.tree.map(lambda leaf: leaf.dtype, state)
    cohort = np.arange(7)
    plan = simulated.plan(cohort, simulated.assign(state, cohort))
    state, report = simulated.round(state, clients, plan)
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == kinds
    arrays = {"images": digits.test_images[:40], "labels": digits.test_labels[:40]}
    return state, report, simulated.evaluate(state, chunk_test_set(arrays, 20), clients.about)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_round_is_the_same_in_double_precision_mode(make_simulation, clients, digits, name):
    single = run(make_simulation, clients, digits, OPTIONS[name])
    with jax.enable_x64():
        double = run(make_simulation, clients, digits, OPTIONS[name])
    for one, other in zip(jax.tree.leaves(single), jax.tree.leaves(double), strict=True):
        assert one.dtype == other.dtype
        if not jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            close = np.isclose(one, other, atol=2e-4)
            # What lies between two of int8's steps may be sent as either of them.
            assert close.mean() > 0.999 if name == "everything" and close.size else close.all()


def test_rounds_on_the_device_are_too(make_simulation, clients):
    simulated = make_simulation(policy=make_policy("flex", exploration=0.5))
    rounds = jax.jit(run_on_device(simulated, 2, per_round=5))
    single, _ = rounds(simulated.init(jax.random.key(0)), clients)
    with strictly():
        double, _ = rounds(simulated.init(jax.random.key(0)), clients)
    assert jax.tree.map(lambda x: x.dtype, single) == jax.tree.map(lambda x: x.dtype, double)
    assert np.array_equal(single.clients.slots, double.clients.slots)
