"""Clients that join after others have trained."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import models, simulation
from flexmoe_jax.assignment import Solution, make_policy
from flexmoe_jax.client import LocalTraining
from flexmoe_jax.errors import InputError
from flexmoe_jax.federation import Federation
from flexmoe_jax.metrics import newcomer_figures
from flexmoe_jax.models import Ownership
from flexmoe_jax.server import FitnessOptions
from flexmoe_jax.simulation import (
    await_newcomers,
    chunk_test_set,
    client_mesh,
    probe_traffic,
    tree_bytes,
)
from flexmoe_jax.types import Own, Params, State
from tests.conftest import CAPACITY
from tests.simulation.conftest import DEEP, EXPERTS, MODULE, plain, prepare

COMING = np.array([1, 3, 4])  # of the seven clients' examples, shown again by others
SCORE = FitnessOptions(score="loss", initial=0.25)
LOCAL = LocalTraining(optax.sgd(0.1), epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def shown(clients):
    return clients.of(COMING)


@pytest.fixture(scope="module")
def test(digits):
    arrays = {"images": digits.test_images, "labels": digits.test_labels.astype(np.int32)}
    return chunk_test_set(arrays, 40)


def trained(simulated, clients, rounds=2):
    state = simulated.init(jax.random.key(0))
    for _ in range(rounds):
        everyone = np.arange(7)
        plan = simulated.plan(everyone, simulated.assign(state, everyone))
        state, _ = simulated.round(state, clients, plan)
    return state


class Started(NamedTuple):
    """A trained federation with shared gates, which newcomers then join."""

    federation: Federation
    state: State
    coming: simulation.Newcomers
    owns: Own
    fitness: np.ndarray
    solutions: tuple[Solution, ...]


@pytest.fixture(scope="module")
def started(make_simulation, clients, shown) -> Started:
    policy = make_policy("flex", exploration=2.0)
    simulated = make_simulation(
        ownership=Ownership(shared_gate=True), fitness=SCORE, policy=policy, prior=True
    )
    federation, state = simulated.setting.federation, trained(simulated, clients)
    coming = await_newcomers(federation, shown, CAPACITY[COMING])
    owns = coming.init(jax.random.key(0))
    fitness = coming.probe(state.server, owns, shown)
    return Started(federation, state, coming, owns, np.asarray(fitness), coming.enrol(fitness))


def test_a_probe_is_the_score_of_each_expert_held_alone(started, shown):
    server = started.state.server
    params = started.federation.layout.merge(Params(server.shared, server.experts, {}, {}))

    @jax.jit
    def losses(rows):
        def alone(e):
            variables = {"params": params, "held": {"mask": jnp.arange(EXPERTS) == e}}
            logits = MODULE.apply(variables, prepare(shown.arrays["images"][rows]))
            labels = shown.arrays["labels"][rows]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

        return jax.vmap(alone)(jnp.arange(EXPERTS))

    expected = [
        np.exp(-np.asarray(losses(rows))[:, :size].mean(axis=1))
        for rows, size in zip(np.asarray(shown.index), np.asarray(shown.size), strict=True)
    ]
    assert np.allclose(started.fitness, [expected], rtol=1e-4)


def test_newcomers_fare_as_clients_with_the_same_experts(started, shown, test):
    federation, state, before = started.federation, started.state, plain(started.state)
    coming, solutions = started.coming, started.solutions
    found = coming.evaluate(state.server, started.owns, solutions, test, shown.about)
    # They hold the fittest of what they have room for.
    held, fitness = solutions[0].assignment, started.fitness[0]
    assert held.sum(axis=1).tolist() == CAPACITY[COMING].tolist()
    rank = np.argsort(np.argsort(-fitness, axis=1), axis=1)
    np.testing.assert_array_equal(held, rank < CAPACITY[COMING, None])
    # Clients that trained, with gates that travel, would fare alike with these experts.
    given = np.array(state.clients.slots)
    given[COMING] = simulation.assignment_slots(held[:, None], federation.slots)
    alike = state._replace(clients=state.clients._replace(slots=given))
    shares = np.zeros((7, 10), np.float32)
    shares[COMING] = shown.label_share
    about = shown.about._replace(label_share=shares)
    mesh = client_mesh(1)
    expected = jax.jit(lambda s: simulation.evaluate(federation, mesh, s, test, about))(alike)
    assert np.allclose(found.personal_accuracy, expected.personal_accuracy[COMING])
    assert np.allclose(found.personal_loss, expected.personal_loss[COMING], rtol=1e-5)
    figures = newcomer_figures(found)
    assert figures.keys() == {f"eval/newcomer_{w}" for w in ("clients", "accuracy", "loss")}
    assert figures["eval/newcomer_clients"] == 3
    assert figures["eval/newcomer_accuracy"] == pytest.approx(found.personal_accuracy.mean())
    assert figures["eval/newcomer_loss"] == pytest.approx(found.personal_loss.mean())
    # Nothing of this has changed the federation.
    chex.assert_trees_all_equal(before, plain(state))


def test_figures_are_of_those_with_something_of_their_own(started, shown, digits):
    """Newcomers with test examples of their own; the second has none."""
    owner = np.where(np.arange(100) % 2, 0, 2)
    arrays = {"images": digits.test_images, "labels": digits.test_labels.astype(np.int32)}

    def figures(group):
        chunks = chunk_test_set(arrays, 40, group=group)
        found = started.coming.evaluate(
            started.state.server, started.owns, started.solutions, chunks, shown.about
        )
        return found, newcomer_figures(found)

    found, of_two = figures(owner)
    assert found.personal_weight.tolist() == [50, 0, 50]
    assert of_two["eval/newcomer_clients"] == 2
    hits = np.asarray(found.personal.hits)
    assert of_two["eval/newcomer_accuracy"] == pytest.approx((hits[0] + hits[2]) / 100)
    assert figures(np.full(100, -1))[1] == {"eval/newcomer_clients": 0}


def test_devices_change_nothing_beyond_rounding(started, shown, test, digits):
    where, federation = client_mesh(2), started.federation
    arrays = {"images": digits.test_images, "labels": digits.test_labels.astype(np.int32)}
    coming = await_newcomers(federation, shown, CAPACITY[COMING], mesh=where)
    server, data = (simulation.replicate(x, where) for x in (started.state.server, shown))
    owns = coming.init(jax.random.key(0))
    assert np.allclose(coming.probe(server, owns, data), started.fitness, atol=1e-5)
    shared = chunk_test_set(arrays, 40, where)
    found = [
        together.evaluate(of, own, started.solutions, tests, known.about).personal_accuracy
        for together, of, own, tests, known in (
            (coming, server, owns, shared, data),
            (started.coming, started.state.server, started.owns, test, shown),
        )
    ]
    assert np.allclose(*found)


def test_layers_assigned_one_by_one_are_probed_in_changing_company(make_simulation, clients):
    """Batch s scores each pair of experts (e, e + s): by a plain loop over the two layers."""
    simulated = make_simulation(
        model=DEEP, ownership=Ownership(shared_gate=True), layers="each", fitness=SCORE, local=LOCAL
    )
    federation, state = simulated.setting.federation, trained(simulated, clients)
    shown = clients.of(COMING[1:2]).few(20, seed=0)  # two batches and a half
    coming = await_newcomers(federation, shown, np.array([2]))
    owns = coming.init(jax.random.key(0))
    fitness = np.asarray(coming.probe(state.server, owns, shown))
    assert fitness.shape == (2, 1, EXPERTS)
    params = federation.layout.merge(Params(state.server.shared, state.server.experts, {}, {}))
    arrays = {name: jnp.asarray(values) for name, values in shown.arrays.items()}

    @jax.jit
    def loss_of(pair, rows):
        held = {
            layer: jnp.arange(EXPERTS) == e
            for layer, e in zip(federation.layout.layers, pair, strict=True)
        }
        logits, _ = DEEP.apply(params, arrays["images"][rows], held)
        labels = arrays["labels"][rows]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    total = np.zeros((2, EXPERTS))
    for s, start in enumerate((0, 8, 16)):
        rows = np.asarray(shown.index)[0, start : min(start + 8, 20)]
        for e in range(EXPERTS):
            loss = float(loss_of((e, (e + s) % EXPERTS), rows))
            total[0, e] += loss
            total[1, (e + s) % EXPERTS] += loss
    assert np.allclose(fitness[:, 0], np.exp(-total / 20), rtol=1e-4)
    assert not np.allclose(fitness[0], fitness[1])
    solutions = coming.enrol(fitness)
    assert [one.assignment.sum() for one in solutions] == [2, 2]


def test_experts_that_stay_with_their_clients_are_tried_together(make_simulation, clients, test):
    everything = np.full(7, EXPERTS)
    simulated = make_simulation(
        ownership=Ownership(("expert",)), capacity=everything, policy=make_policy("full")
    )
    federation, state = simulated.setting.federation, trained(simulated, clients, rounds=1)
    shown = clients.of(COMING)
    coming = await_newcomers(federation, shown, everything[COMING])
    owns = coming.init(jax.random.key(0))
    # Their gates and experts are as initialised, as are those of others that have not trained.
    kernels = np.asarray(owns.gates["mixture"]["gate"]["kernel"])
    assert len(np.unique(kernels.reshape(3, -1), axis=0)) == 3
    fitness = coming.probe(state.server, owns, shown)
    assert np.isfinite(fitness).all()
    found = coming.evaluate(state.server, owns, coming.enrol(fitness), test, shown.about)
    assert np.isfinite(found.personal_accuracy).all()
    with pytest.raises(InputError, match=r"model\.private=expert"):
        await_newcomers(federation, shown, np.full(3, 1))


def test_what_cannot_be_is_refused(started, shown):
    federation = started.federation
    for capacity, line in (
        ([1, 2], r"capacity=\[1, 2\]: give a whole number for each of the 3 newcomers"),
        ([1, 2, 5], "capacity=5: give 0 to 4"),
    ):
        with pytest.raises(InputError, match=line):
            await_newcomers(federation, shown, np.array(capacity))


def test_a_probe_downloads_everything_once(started):
    found, server = probe_traffic(started.federation, 2), started.state.server
    assert found.down.tolist() == [tree_bytes((server.shared, server.experts))] * 2
    # Three numbers of four bytes for each expert.
    assert found.up.tolist() == [EXPERTS * 12] * 2


def test_of_a_shortlist_the_routers_say_who_is_on_it(make_simulation, clients, shown):
    module = MODULE.clone(with_router=True)
    simulated = make_simulation(
        model=models.classifier(module).after(prepare),
        ownership=Ownership(shared_gate=True),
        fitness=SCORE,
        local=LOCAL,
    )
    federation, state = simulated.setting.federation, trained(simulated, clients)
    room = np.array([1, 2, 1])
    found = []
    for shortlist in (0, 2):
        coming = await_newcomers(federation, shown, room, shortlist=shortlist)
        found.append(np.asarray(coming.probe(state.server, coming.init(jax.random.key(0)), shown)))
    every, short = (one[0] for one in found)
    params = federation.layout.merge(Params(state.server.shared, state.server.experts, {}, {}))

    @jax.jit
    def chances(rows):
        images, router = prepare(shown.arrays["images"][rows]), params["router"]
        features = module.apply({"params": params}, images, method="features")
        return jax.nn.softmax(features @ router["kernel"].T + router["bias"][None])

    index, sizes = np.asarray(shown.index), np.asarray(shown.size)
    for n, (rows, size) in enumerate(zip(index, sizes, strict=True)):
        part = np.asarray(chances(rows))[:size].mean(axis=0)
        asked = np.isin(np.arange(EXPERTS), np.argsort(-part)[:2])
        np.testing.assert_allclose(short[n, asked], every[n, asked], rtol=1e-6)
        assert (short[n, ~asked] < short[n, asked].min() - 0.5).all()


def test_a_shortlist_needs_routers_and_room(started, shown):
    for shortlist, remedy in ((2, "give 3, the most that one can hold, to 4"), (3, "only routers")):
        with pytest.raises(InputError, match=f"clients.shortlist={shortlist}: .*{remedy}"):
            await_newcomers(started.federation, shown, CAPACITY[COMING], shortlist=shortlist)
