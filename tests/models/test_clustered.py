"""Whole models as experts: each is a complete model, and clients of one kind come to share one."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from flax.core import meta

from flexmoe_jax import data, models, simulation, tasks
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.client import LocalTraining
from flexmoe_jax.errors import InputError
from flexmoe_jax.federation import Federation
from flexmoe_jax.models.ownership import ROOT
from flexmoe_jax.server import FitnessOptions

X = np.random.default_rng(0).normal(size=(5, 2, 2, 1)).astype(np.float32)
DENSE = models.classifier(models.MoEClassifier(models.MLP((6,)), 3, experts=1, hidden=4))


@pytest.fixture(scope="module")
def drawn():
    whole = models.clustered(DENSE, 4)
    return whole, jax.device_get(meta.unbox(jax.jit(whole.init)(jax.random.key(0), X)))


dense = jax.jit(DENSE.apply)


def expert(params, number):
    return jax.tree.map(lambda leaf: leaf[number], params["expert"])


def test_each_expert_is_a_whole_model(drawn):
    whole, params = drawn
    one = {"mixture": np.ones(1, bool)}
    apart = [np.asarray(dense(expert(params, e), X, one)[0]) for e in range(4)]
    assert np.abs(apart[0] - apart[1]).max() > 1e-3  # each is drawn anew
    apply = jax.jit(whole.apply)
    for e in range(4):
        slot = jax.tree.map(lambda leaf, e=e: leaf[e : e + 1], params)
        outputs, routings = apply(slot, X, {ROOT: np.ones(1, bool)})
        np.testing.assert_allclose(outputs, apart[e], atol=1e-6)
        assert np.asarray(routings[ROOT].selected).all()


def test_several_are_averaged_as_the_gate_has_them(drawn):
    whole, params = drawn
    params = params | {"gate": {"bias": np.log(np.array([1.0, 9.0, 3.0, 1.0], np.float32))}}
    held = {ROOT: np.array([True, False, True, False])}
    outputs, routings = jax.jit(whole.apply)(params, X, held)
    one = {"mixture": np.ones(1, bool)}
    first, third = (np.asarray(dense(expert(params, e), X, one)[0]) for e in (0, 2))
    np.testing.assert_allclose(outputs, first / 4 + 3 * third / 4, atol=1e-6)
    np.testing.assert_allclose(np.asarray(routings[ROOT].combine)[0], [0.25, 0, 0.75, 0], atol=1e-6)


def test_experts_within_experts_are_refused():
    inside = models.classifier(models.MoEClassifier(models.MLP((6,)), 3, experts=2, hidden=4))
    with pytest.raises(InputError, match=r"model\.experts=2: .* no more than one itself"):
        models.clustered(inside, 4).init(jax.random.key(0), X)


KIND = np.arange(9) % 3
EVERYBODY = np.arange(9, dtype=np.int32)


@pytest.fixture(scope="module")
def clients():
    """Three kinds of clients with the same pictures, but different labels."""
    rng = np.random.default_rng(1)
    labels = rng.integers(3, size=180).astype(np.int32)
    pictures = np.eye(3)[labels] + 0.1 * rng.normal(size=(180, 3))
    parts = np.split(np.arange(180), 9)
    named = labels.copy()
    for number, part in enumerate(parts):
        named[part] = (labels[part] + KIND[number]) % 3
    arrays = {"images": pictures.astype(np.float32).reshape(-1, 3, 1, 1), "labels": named}
    return data.join(arrays, parts, None)


def federate(clients, **fitness):
    return Federation(
        model=models.clustered(DENSE, 6),
        sample={name: x[:2] for name, x in clients.arrays.items()},
        capacity=np.ones(9, np.int64),
        policy=make_policy("greedy"),
        local=LocalTraining(optax.sgd(0.3), epochs=2, batch_size=10),
        task=tasks.classification(),
        fitness=FitnessOptions("loss", **fitness),
        prior=False,
    )


def test_clients_that_are_asked_come_to_share_the_model_that_fits_them(clients):
    simulated = simulation.simulate(federate(clients, probe="all"), clients)
    state = simulated.init(jax.random.key(2))
    for _ in range(6):
        plan = simulated.plan(EVERYBODY, simulated.assign(state, EVERYBODY, clients))
        state, report = simulated.round(state, clients, plan)
    held = np.asarray(state.clients.slots)[:, 0, 0]
    assert len(set(held)) == 3
    assert {tuple(held[kind == KIND]) for kind in range(3)} == {(e, e, e) for e in set(held)}
    assert float(report.loss.mean()) < 0.3
    # Their predictions are those of each model alone on their examples; a part is checked.
    some = EVERYBODY[[4, 7]]
    (alone,) = simulated.assign(state, some, clients)
    np.testing.assert_array_equal(alone.assignment.argmax(axis=1), held[some])


def test_nobody_can_be_asked_without_examples(clients):
    simulated = simulation.simulate(federate(clients, probe="all"), clients)
    with pytest.raises(InputError, match=r"data=None: fitness\.probe=all asks clients"):
        simulated.assign(simulated.init(jax.random.key(0)), EVERYBODY)
    with pytest.raises(InputError, match=r"fitness\.probe=all: not on the device"):
        simulation.round_on_device(simulated)
