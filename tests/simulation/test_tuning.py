"""Fine-tuning: each client trains once more, for itself, and the federation stays as it is."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import simulation
from flexmoe_jax.metrics import tuned_figures
from flexmoe_jax.simulation import chunk_test_set, client_mesh
from tests.conftest import CAPACITY
from tests.simulation.conftest import EXPERTS, plain

COHORT = np.arange(len(CAPACITY), dtype=np.int32)


@pytest.fixture(scope="module")
def begun(simulated, clients):
    """Returns a simulation after a round in which client 6 was absent."""
    state = simulated.init(jax.random.key(0))
    cohort = COHORT[:6]
    plan = simulated.plan(cohort, simulated.assign(state, cohort))
    return simulated.round(state, clients, plan)[0]


def test_a_client_alone_is_tuned_to_what_its_next_round_would_make_of_it(
    make_simulation, clients, digits
):
    # Of one client that holds all experts, the mean of all updates is its own.
    alone = clients.of(np.array([3]))
    simulated = make_simulation_of(make_simulation, alone)
    state = simulated.init(jax.random.key(0))
    cohort = np.zeros(1, np.int32)
    for _ in range(2):
        plan = simulated.plan(cohort, simulated.assign(state, cohort))
        tuned = simulated.tune(state, alone) if int(state.server.round) else None
        state, _ = simulated.round(state, alone, plan)
    first = jax.tree.map(lambda x: x[0], tuned)
    chex.assert_trees_all_close(first.shared, state.server.shared, atol=1e-6)
    chex.assert_trees_all_close(first.experts, state.server.experts, atol=1e-6)
    chex.assert_trees_all_close(
        first.gate["mixture"], jax.tree.map(lambda x: x[0], state.clients.gates["mixture"])
    )
    # Judged as the model of the next round is.
    test = chunk_test_set({"images": digits.test_images, "labels": digits.test_labels})
    after = simulated.evaluate(state, test, alone.about)
    judged = simulated.evaluate(state, test, alone.about, tuned)
    np.testing.assert_allclose(judged.personal_loss, after.personal_loss, rtol=1e-5)
    np.testing.assert_array_equal(judged.personal.hits, after.personal.hits)
    figures = tuned_figures(judged)
    assert set(figures) == {"eval/tuned_accuracy", "eval/tuned_loss"}
    assert figures["eval/tuned_loss"] == pytest.approx(float(after.personal_loss[0]), rel=1e-5)


def test_a_learning_rate_that_has_fallen_to_nothing_is_whole_again(make_simulation, clients):
    alone = clients.of(np.array([3]))
    plain = make_simulation_of(make_simulation, alone).setting.federation
    after = []
    for decay in (None, optax.linear_schedule(1.0, 0.0, 1)):
        local = dataclasses.replace(plain.local, decay=decay)
        simulated = simulation.simulate(plain.replace(local=local), alone)
        state, cohort = simulated.init(jax.random.key(0)), np.zeros(1, np.int32)
        plan = simulated.plan(cohort, simulated.assign(state, cohort))
        state, _ = simulated.round(state, alone, plan)
        after.append(simulated.tune(state, alone))
    chex.assert_trees_all_close(*after, rtol=1e-6)


def make_simulation_of(make_simulation, clients):
    """The small federation, of one client."""
    choices = make_simulation(capacity=CAPACITY).setting.federation
    federation = choices.replace(capacity=np.array([EXPERTS]))
    return simulation.simulate(federation, clients)


@pytest.mark.parametrize("devices", [1, 4])
def test_everybody_is_tuned_and_nothing_else_changes(make_simulation, clients, begun, devices):
    mesh = client_mesh(devices)
    state, known = simulation.replicate((begun, clients), mesh)
    tuned = make_simulation(mesh=mesh).tune(state, known)
    chex.assert_trees_all_equal(plain(state), plain(begun))
    chex.assert_tree_shape_prefix(tuned, (len(CAPACITY),))
    kernel = np.asarray(jax.tree.leaves(tuned.shared)[0])
    moved = np.abs(kernel - np.asarray(jax.tree.leaves(begun.server.shared)[0])).max(axis=1)
    # Clients that have held experts change, each in a different way.
    assert (moved[:6].reshape(6, -1).max(axis=1) > 1e-4).all()
    assert not moved[6].any()
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-4


def test_label_shares_are_not_added_to_what_was_fitted_to_them(
    make_simulation, clients, digits, begun
):
    simulated, without = make_simulation(prior=True), make_simulation(prior=False)
    test = chunk_test_set({"images": digits.test_images, "labels": digits.test_labels})
    tuned = simulated.tune(begun, clients)
    judged = [one.evaluate(begun, test, clients.about, tuned) for one in (simulated, without)]
    chex.assert_trees_all_equal(judged[0].personal, judged[1].personal)
    assert jnp.isfinite(judged[0].personal.loss[:6]).all()
