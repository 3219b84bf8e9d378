"""Clients that compute in bfloat16: state, updates and counts stay in single precision."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from flexmoe_jax import models
from flexmoe_jax.client import LocalTraining
from flexmoe_jax.metrics import evaluation_figures
from flexmoe_jax.simulation import chunk_test_set
from tests.models.test_bfloat16 import products
from tests.simulation.conftest import EXPERTS, prepare

BATCH, FEATURES, SLOTS = 11, 32, 3
MODULE = models.MoEClassifier(models.MLP((64, FEATURES)), 10, EXPERTS, hidden=32)


@pytest.fixture
def make(make_simulation):
    def make(dtype):
        return make_simulation(
            model=models.classifier(MODULE).computed_in(dtype).after(prepare),
            local=LocalTraining(optax.adam(0.01), epochs=3, batch_size=BATCH, balance=0.01, z=1e-3),
        )

    return make


def plan_of(simulated, state):
    everybody = np.arange(7)
    return simulated.plan(everybody, simulated.assign(state, everybody))


def test_a_round_multiplies_in_bfloat16(make, clients):
    simulated = make("bfloat16")
    state = simulated.init(jax.random.key(0))
    program = simulated.round.lower(state, clients, plan_of(simulated, state)).as_text()
    # Where a batch is multiplied: all but what decides the gate's choice and counts it.
    gate = BATCH * FEATURES * SLOTS
    kinds = {
        kind
        for line in program.splitlines()
        if f"<{BATCH}x" in line or f"x{BATCH}x" in line
        for kind, work in products(line)
        if work > 1.01 * gate
    }
    assert kinds == {"bf16"}


def test_it_trains_as_in_single_precision(make, clients, digits):
    test = chunk_test_set({"images": digits.test_images, "labels": digits.test_labels}, 100)
    keys = ("eval/global_accuracy", "eval/personal_accuracy", "eval/server_accuracy")
    kinds, means = [], []
    for dtype in ("float32", "bfloat16"):
        simulated, figures = make(dtype), []
        for seed in range(8):  # of which one alone ends up to 0.08 away from another
            state = simulated.init(jax.random.key(seed))
            for _ in range(8):
                state, report = simulated.round(state, clients, plan_of(simulated, state))
            found = simulated.evaluate(state, test, clients.about)
            figures.append([evaluation_figures(found)[key] for key in keys])
        kinds.append(jax.tree.map(lambda leaf: leaf.dtype, (state, report, found)))
        means.append(np.mean(figures, axis=0))
    assert kinds[0] == kinds[1]
    assert (means[0] > 0.8).all()
    assert np.abs(means[0] - means[1]).max() < 0.04
