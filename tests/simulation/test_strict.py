"""JAX's strict modes: no implicit promotion of types or ranks, and x64 changes nothing."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import data, models, simulation, tasks
from flexmoe_jax.assignment import dual_assign, make_policy
from flexmoe_jax.client import LocalTraining
from flexmoe_jax.federation import Federation
from flexmoe_jax.metrics import evaluation_figures
from flexmoe_jax.server import FitnessOptions
from tests.simulation.conftest import strictly

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 48).astype(np.int32)
IMAGES = RNG.integers(0, 256, (48, 8, 8, 1), np.uint8)
CLASSIFICATION = (
    tasks.classification(),
    models.classifier(
        models.MoEClassifier(models.make_backbone("cnn", widths=(4, 6), groups=2), 3, 4, hidden=5)
    ),
    {"images": IMAGES, "labels": LABELS},
    data.standardise(IMAGES),
)
NEXT_TOKEN = (
    tasks.next_token(),
    models.decoder(models.Transformer(4, 1, 8, heads=2, hidden=5, vocabulary=16, router=True)),
    {"tokens": RNG.integers(0, 16, (48, 7), np.uint8)},
    lambda tokens: tokens,
)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(CLASSIFICATION, "float32"), (NEXT_TOKEN, "bfloat16")],
    ids=["classification", "next_token"],
)
def test_a_round_and_an_evaluation_run_under_all_of_them(case, dtype):
    task, model, arrays, prepare = case
    with strictly():
        counts = np.full((4, 3), 4) if "labels" in arrays else None
        clients = data.join(arrays, list(np.arange(48).reshape(4, 12)), counts)
        federation = Federation(
            model=model.computed_in(dtype).after(prepare),
            sample={name: values[:2] for name, values in arrays.items()},
            capacity=np.array([1, 2, 2, 3]),
            policy=make_policy("flex"),
            local=LocalTraining(optax.adam(0.01), batch_size=6, balance=0.01, z=0.01),
            task=task,
            ownership=models.Ownership(shared_gate=True),
            optimizer=optax.adam(0.01),
            fitness=FitnessOptions("loss", affinity=1.0),
        )
        simulated = simulation.simulate(federation, clients)
        state, everybody = simulated.init(jax.random.key(0)), np.arange(4)
        kinds = jax.tree.map(lambda leaf: leaf.dtype, state)
        plan = simulated.plan(everybody, simulated.assign(state, everybody))
        state, report = simulated.round(state, clients, plan)
        test = simulation.chunk_test_set(arrays, 24)
        found = simulated.evaluate(state, test, clients.about)
        # What is promoted shows when a program is traced: newcomers' is neither compiled nor run.
        coming = simulation.await_newcomers(federation, clients, federation.capacity)
        fitness = jax.eval_shape(coming.probe, state.server, state.clients, clients)
    assert fitness.dtype == np.float32
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == kinds
    assert bool(report.finite)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {
        np.dtype(np.float32),
        np.dtype(bool),
    }
    assert evaluation_figures(found)["eval/clients"] == 4


@pytest.mark.parametrize("weight", [2.0, RNG.random(24), RNG.random((24, 6))], ids=np.ndim)
def test_assignments_by_prices_are_traced_under_all_of_them(weight):
    fitness, mix = RNG.random((24, 6)).astype(np.float32), RNG.random((24, 3))
    assign = partial(dual_assign, load_weight=weight, descriptor=mix, diversity=np.float64(0.1))
    with strictly():
        found = jax.eval_shape(assign, fitness, RNG.integers(0, 7, 24), 0, jnp.inf)
    numbers = found.value, found.bound, found.load, found.prices
    assert {leaf.dtype for leaf in jax.tree.leaves(numbers)} == {np.dtype(np.float32)}
