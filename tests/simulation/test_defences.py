"""Rounds with faulty clients: how the server treats their updates."""

from __future__ import annotations

import re
from dataclasses import replace

import chex
import jax
import numpy as np
import optax
import pytest

from flexmoe_jax import models
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.client import Codec, LocalTraining, make_compressor
from flexmoe_jax.errors import InputError
from flexmoe_jax.server import Admission, geometric_median, trimmed_mean
from flexmoe_jax.simulation import Arrival, client_mesh, replicate, run_on_device
from tests.simulation.conftest import EXPERTS, plain

EVERYBODY = np.arange(7, dtype=np.int32)


def play(simulated, clients, state, factor=1.0, noise=None, work=1.0):
    """A round of all clients; client 2 tampers with its update."""
    tamper = np.ones(7)
    tamper[2] = factor
    arrival = Arrival(np.full(7, work), np.ones(7, bool), tamper, noise)
    plan = simulated.plan(EVERYBODY, simulated.assign(state, EVERYBODY), arrival)
    return simulated.round(state, clients, plan)


def averaged(state):
    return jax.device_get((state.server.shared, state.server.experts))


def own_parts(state):
    return jax.tree.leaves(plain(state).clients._replace(slots=()))


def norms_of(state):
    return np.asarray(state.server.ledger.norms)


def without_norms(state):
    ledger = state.server.ledger._replace(norms=())
    return plain(state._replace(server=state.server._replace(ledger=ledger)))


@pytest.fixture(scope="module")
def guarded(make_simulation):
    """A simulation with every kind of state that a refusal has to restore."""
    return make_simulation(
        codec=Codec(make_compressor("int8")),
        optimizer=optax.adam(0.01),
        ownership=models.Ownership(("head",)),
        block_size=2,
    )


@pytest.mark.parametrize("factor", [-1000.0, 100.0])
def test_a_long_update_in_the_first_round_voids_it_and_is_refused_later(guarded, clients, factor):
    simulated = guarded
    first, report = play(simulated, clients, simulated.init(jax.random.key(0)), factor)
    assert report.void
    assert report.finite
    assert np.asarray(report.quarantined).sum() == 7
    assert not np.asarray(report.examples).any()
    assert not np.asarray(report.usage).any()
    # The state is as if no update had arrived, except for the lengths that were recorded.
    nobody, silent = play(simulated, clients, simulated.init(jax.random.key(0)), work=0.0)
    assert not silent.void
    # The one that was too long tells nothing of the spread of honest lengths.
    assert (norms_of(first) > 0).sum(axis=1).tolist() == [7, 7, 6, 6]
    chex.assert_trees_all_equal(without_norms(first), without_norms(nobody))

    before = own_parts(first)
    second, report = play(simulated, clients, first, factor)
    refused = np.asarray(report.quarantined)
    assert not report.void
    assert refused.sum() == 1
    assert (np.asarray(report.examples)[refused] == 0).all()
    # The one refused goes back to its gate, and to what else is its own.
    for old, new in zip(before, own_parts(second), strict=True):
        assert (old[2] == new[2]).all()
        assert (old[EVERYBODY != 2] != new[EVERYBODY != 2]).any()
    assert simulated.round._cache_size() == 1


def test_where_updates_are_collected_the_first_round_refuses_the_long_one_alone(
    make_simulation, clients
):
    simulated = make_simulation(aggregator=trimmed_mean(0.0), ownership=models.Ownership(("head",)))
    state = simulated.init(jax.random.key(0))
    before = plain(state)
    state, report = play(simulated, clients, state, 1000.0)
    refused = np.asarray(report.quarantined)
    assert not report.void
    assert refused.sum() == 1
    assert ((np.asarray(report.examples) == 0) == refused).all()
    assert np.asarray(report.usage).sum() == np.asarray(report.examples).sum()
    # Its update is in no mean, and the client keeps its previous state.
    after = plain(state)
    moved = jax.tree.map(lambda o, n: np.abs(o - n), before.server.shared, after.server.shared)
    assert 0 < max(leaf.max() for leaf in jax.tree.leaves(moved)) < 3
    kept = np.ones(7, bool)
    for old, new in zip(own_parts(before), own_parts(after), strict=True):
        kept &= (old == new).reshape(7, -1).all(axis=1)
    assert kept.tolist() == (EVERYBODY == 2).tolist()


def test_without_faults_nobody_is_refused_and_limits_change_nothing(make_simulation, clients):
    judged, free = (make_simulation(admission=Admission(norm_factor=f)) for f in (10.0, 0.0))
    states = [simulated.init(jax.random.key(0)) for simulated in (judged, free)]
    for _ in range(3):
        for number, simulated in enumerate((judged, free)):
            states[number], report = play(simulated, clients, states[number])
            assert not np.asarray(report.quarantined).any()
    assert states[1].server.ledger.norms == ()
    chex.assert_trees_all_close(*map(without_norms, states), atol=1e-6, rtol=1e-6)


def test_noise_depends_on_seed_round_and_client_alone(make_simulation, clients):
    """Updates are tiny, and the noise, a multiple of their length, dominates the aggregate."""
    loud, quiet = np.where(EVERYBODY == 2, 1e3, 0.0), np.zeros(7)
    short = LocalTraining(optax.sgd(1e-3), balance=0.0, batch_size=8, max_steps=1)
    simulateds = [
        make_simulation(admission=Admission(quarantine=False), block_size=size, local=short)
        for size in (1, 3)
    ]

    def moves(simulated, noise, seed=0):
        state = simulated.init(jax.random.key(seed))
        found = []
        for _ in range(2):
            before = jax.device_get(state.server.shared)
            state, _ = play(simulated, clients, state, noise=noise)
            apart = jax.tree.map(np.subtract, jax.device_get(state.server.shared), before)
            found.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(apart)]))
        return np.array(found)

    one, other = (moves(simulated, loud) for simulated in simulateds)
    assert np.allclose(one, other, atol=1e-5 * np.abs(one).max())
    still = moves(simulateds[0], quiet)
    assert np.linalg.norm(one) > 20 * np.linalg.norm(still)
    other_seed = moves(simulateds[0], loud, seed=1)
    correlation = np.corrcoef([*one, *other_seed])
    assert np.abs(correlation - np.eye(4)).max() < 0.2


@pytest.mark.parametrize(
    ("aggregator", "robust"),
    [(geometric_median(), True), (trimmed_mean(0.2), True), (None, False)],
    ids=["geometric", "trimmed", "mean"],
)
def test_robust_means_withstand_what_ends_a_mean(make_simulation, clients, aggregator, robust):
    # All clients hold all experts, so every expert has several holders.
    simulated = make_simulation(
        aggregator=aggregator,
        admission=Admission(quarantine=False),
        capacity=np.full(7, EXPERTS),
        policy=make_policy("full"),
    )
    moved = {}
    for factor in (1.0, -1e6, np.nan) if robust else (-1e6,):
        state = simulated.init(jax.random.key(0))
        start = averaged(state)
        state, report = play(simulated, clients, state, factor)
        assert report.finite
        moved[factor] = max(
            float(np.abs(a - b).max())
            for a, b in zip(
                *map(jax.tree.leaves, ((state.server.shared, state.server.experts), start)),
                strict=True,
            )
        )
    # No honest client moves a parameter by 1; a mean follows the one that blew its update up.
    if robust:
        assert 0 < max(moved.values()) < 1
    else:
        assert moved[-1e6] > 1e3


def test_devices_exchange_updates_before_a_robust_mean_begins(make_simulation, clients):
    # In its loops devices could come to wait for each other in different exchanges: a deadlock.
    states = []
    for devices in (1, 2):
        mesh = client_mesh(devices)
        simulated = make_simulation(aggregator=geometric_median(), mesh=mesh, block_size=2)
        data = replicate(clients, mesh)
        state = simulated.init(jax.random.key(0))
        plan = simulated.plan(EVERYBODY, simulated.assign(state, EVERYBODY))
        program = simulated.round.lower(state, data, plan).compile()
        text = program.as_text()
        exchanges = [len(EXCHANGE.findall(part)) for part in (text, text[text.index("\nENTRY") :])]
        assert exchanges[0] == exchanges[1]
        assert (exchanges[0] > 0) == (devices > 1)
        states.append(plain(program(state, data, plan)[0]))
    chex.assert_trees_all_close(*states, atol=1e-5, rtol=1e-5)


EXCHANGE = re.compile(r" (?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(")


def test_a_model_that_is_no_number_shows_in_the_report(make_simulation, clients):
    careless = make_simulation(admission=Admission(quarantine=False))
    diverging = make_simulation(
        admission=Admission(quarantine=False),
        local=LocalTraining(optax.sgd(1e30), balance=0.0, batch_size=8),
        optimizer=optax.sgd(0.0),
    )
    for simulated, factor, finite in (
        (careless, 1.0, True),
        (careless, np.nan, False),
        (careless, np.inf, False),
        # The client's private parameters count, too.
        (diverging, 1.0, False),
    ):
        _, report = play(simulated, clients, simulated.init(jax.random.key(0)), factor)
        assert bool(report.finite) is finite
        if simulated is diverging:
            assert not np.isfinite(np.asarray(report.loss)).all()


def test_runs_on_the_device_say_in_which_round_a_model_ended(make_simulation, clients):
    simulated = make_simulation(
        policy=make_policy("flex"),
        admission=Admission(quarantine=False),
        local=LocalTraining(optax.sgd(1e30), balance=0.0, batch_size=8),
    )
    _, reports = jax.jit(run_on_device(simulated, 3))(simulated.init(jax.random.key(0)), clients)
    assert reports.training.finite.tolist() == [False] * 3
    assert reports.training.void.tolist() == [False] * 3


def test_secret_noise_has_no_place_on_the_device(make_simulation, clients):
    private = Admission(clip=1.0, noise_multiplier=1.0)
    simulated = make_simulation(policy=make_policy("flex"), admission=private)
    with pytest.raises(InputError, match=r"server\.noise_multiplier=1\.0: on the device no secret"):
        run_on_device(simulated, 1)
    known = replace(private, noise="simulated")
    simulated = make_simulation(policy=make_policy("flex"), admission=known)
    state = simulated.init(jax.random.key(0))
    state, _ = jax.jit(run_on_device(simulated, 1))(state, clients)
    assert np.isfinite(state.server.shared["head"]["bias"]).all()
