"""Rounds with faulty clients: what the server makes of them."""

from __future__ import annotations

import re
from functools import partial

import chex
import jax
import numpy as np
import optax
import pytest

from flexmoe_jax import models
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.errors import InputError
from flexmoe_jax.federated import (
    Arrival,
    LocalTraining,
    Uplink,
    client_mesh,
    geometric_median,
    make_compressor,
    replicate,
    run_on_device,
    trimmed_mean,
)
from tests.federated.conftest import EXPERTS

EVERYBODY = np.arange(7, dtype=np.int32)


def play(algorithm, clients, state, factor=1.0, noise=None, work=1.0):
    """A round of all clients; client 2 tampers with its update."""
    tamper = np.ones(7)
    tamper[2] = factor
    arrival = Arrival(np.full(7, work), np.ones(7, bool), tamper, noise)
    plan = algorithm.plan(EVERYBODY, algorithm.assign(state, EVERYBODY), arrival)
    return algorithm.round(state, clients, plan)


def plain(state):
    return jax.device_get(state._replace(key=0))


@pytest.mark.parametrize("factor", [-1000.0, 100.0])
def test_a_long_update_in_the_first_round_voids_it_and_is_refused_later(
    make_algorithm, clients, factor
):
    algorithm = make_algorithm(
        uplink=Uplink(make_compressor("int8")),
        server=optax.adam(0.01),
        ownership=models.Ownership(("head",)),
        block_size=2,
    )
    first, report = play(algorithm, clients, algorithm.init(jax.random.key(0)), factor)
    assert report.void
    assert report.finite
    assert np.asarray(report.quarantined).sum() == 7
    assert not np.asarray(report.examples).any()
    assert not np.asarray(report.usage).any()
    # All is as if nobody's work had arrived, but for what was learnt of lengths.
    nobody, silent = play(algorithm, clients, algorithm.init(jax.random.key(0)), work=0.0)
    assert not silent.void
    norms = np.asarray(first.norms)
    # The one that was too long tells nothing of the spread of honest lengths.
    assert (norms > 0).sum(axis=1).tolist() == [7, 7, 6, 6]
    chex.assert_trees_all_equal(plain(first._replace(norms=nobody.norms)), plain(nobody))

    before = plain(first)
    second, report = play(algorithm, clients, first, factor)
    refused = np.asarray(report.quarantined)
    assert not report.void
    assert refused.sum() == 1
    assert (np.asarray(report.examples)[refused] == 0).all()
    # The one refused goes back to its gate, and to what else is its own.
    for old, new in zip(
        jax.tree.leaves((before.gates, before.private)),
        jax.tree.leaves(jax.device_get((second.gates, second.private))),
        strict=True,
    ):
        assert (old[2] == new[2]).all()
        assert (old[EVERYBODY != 2] != new[EVERYBODY != 2]).any()
    assert algorithm.round._cache_size() == 1


def test_where_updates_are_collected_the_first_round_refuses_the_long_one_alone(
    make_algorithm, clients
):
    algorithm = make_algorithm(
        aggregator=partial(trimmed_mean, trim=0.0), ownership=models.Ownership(("head",))
    )
    state = algorithm.init(jax.random.key(0))
    before = plain(state)
    state, report = play(algorithm, clients, state, 1000.0)
    refused = np.asarray(report.quarantined)
    assert not report.void
    assert refused.sum() == 1
    assert ((np.asarray(report.examples) == 0) == refused).all()
    assert np.asarray(report.usage).sum() == np.asarray(report.examples).sum()
    # Its update is in no mean, and itself it keeps what it had.
    moved = jax.tree.map(lambda old, new: np.abs(old - new), before.shared, plain(state).shared)
    assert 0 < max(leaf.max() for leaf in jax.tree.leaves(moved)) < 3
    kept = np.ones(7, bool)
    for old, new in zip(
        jax.tree.leaves((before.gates, before.private)),
        jax.tree.leaves((plain(state).gates, plain(state).private)),
        strict=True,
    ):
        kept &= (old == new).reshape(7, -1).all(axis=1)
    assert kept.tolist() == (EVERYBODY == 2).tolist()


def test_without_faults_nobody_is_refused_and_limits_change_nothing(make_algorithm, clients):
    judged, free = (make_algorithm(uplink=Uplink(norm_factor=f)) for f in (10.0, 0.0))
    states = [algorithm.init(jax.random.key(0)) for algorithm in (judged, free)]
    for _ in range(3):
        for number, algorithm in enumerate((judged, free)):
            states[number], report = play(algorithm, clients, states[number])
            assert not np.asarray(report.quarantined).any()
    assert states[1].norms == ()
    chex.assert_trees_all_close(
        plain(states[0]._replace(norms=())), plain(states[1]), atol=1e-6, rtol=1e-6
    )


def test_noise_depends_on_seed_round_and_client_alone(make_algorithm, clients):
    """Clients that stand still send nothing but their noise, of so many times nothing."""
    loud, quiet = np.where(EVERYBODY == 2, 1e3, 0.0), np.zeros(7)
    short = LocalTraining(optax.sgd(1e-3), batch_size=8, max_steps=1)
    algorithms = [
        make_algorithm(uplink=Uplink(quarantine=False), block_size=size, local=short)
        for size in (1, 3)
    ]

    def moves(algorithm, noise, seed=0):
        state = algorithm.init(jax.random.key(seed))
        found = []
        for _ in range(2):
            before = jax.device_get(state.shared)
            state, _ = play(algorithm, clients, state, noise=noise)
            apart = jax.tree.map(np.subtract, jax.device_get(state.shared), before)
            found.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(apart)]))
        return np.array(found)

    one, other = (moves(algorithm, loud) for algorithm in algorithms)
    assert np.allclose(one, other, atol=1e-5 * np.abs(one).max())
    still = moves(algorithms[0], quiet)
    assert np.linalg.norm(one) > 20 * np.linalg.norm(still)
    other_seed = moves(algorithms[0], loud, seed=1)
    correlation = np.corrcoef([*one, *other_seed])
    assert np.abs(correlation - np.eye(4)).max() < 0.2


@pytest.mark.parametrize(
    "aggregator", [geometric_median, partial(trimmed_mean, trim=0.2)], ids=["geometric", "trimmed"]
)
def test_robust_means_withstand_what_ends_a_mean(make_algorithm, clients, aggregator):
    everything = {"capacity": np.full(7, EXPERTS), "policy": make_policy("full")}
    moved = {}
    for factor in (1.0, -1e6, np.nan):
        algorithm = make_algorithm(
            aggregator=aggregator, uplink=Uplink(quarantine=False), **everything
        )
        state = algorithm.init(jax.random.key(0))
        start = jax.device_get((state.shared, state.experts))
        state, report = play(algorithm, clients, state, factor)
        assert report.finite
        moved[factor] = max(
            float(np.abs(a - b).max())
            for a, b in zip(
                *map(jax.tree.leaves, ((state.shared, state.experts), start)), strict=True
            )
        )
    # No honest client moves a parameter by 1.
    assert 0 < max(moved.values()) < 1


def test_devices_exchange_updates_before_a_robust_mean_begins(make_algorithm, clients):
    # In its loops devices could come to wait for each other in different exchanges: a deadlock.
    states = []
    for devices in (1, 2):
        mesh = client_mesh(devices)
        algorithm = make_algorithm(aggregator=geometric_median, mesh=mesh, block_size=2)
        data = replicate(clients, mesh)
        state = algorithm.init(jax.random.key(0))
        plan = algorithm.plan(EVERYBODY, algorithm.assign(state, EVERYBODY))
        program = algorithm.round.lower(state, data, plan).compile()
        text = program.as_text()
        exchanges = [len(EXCHANGE.findall(part)) for part in (text, text[text.index("\nENTRY") :])]
        assert exchanges[0] == exchanges[1]
        assert (exchanges[0] > 0) == (devices > 1)
        states.append(plain(program(state, data, plan)[0]))
    chex.assert_trees_all_close(*states, atol=1e-5, rtol=1e-5)


EXCHANGE = re.compile(r" (?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(")


def test_a_model_that_is_no_number_shows_in_the_report(make_algorithm, clients):
    careless = Uplink(quarantine=False)
    for options, factor, finite in (
        ({}, 1.0, True),
        ({}, np.nan, False),
        ({}, np.inf, False),
        # What its client alone keeps counts, too.
        (
            {"local": LocalTraining(optax.sgd(1e30), batch_size=8), "server": optax.sgd(0.0)},
            1.0,
            False,
        ),
    ):
        algorithm = make_algorithm(uplink=careless, **options)
        _, report = play(algorithm, clients, algorithm.init(jax.random.key(0)), factor)
        assert bool(report.finite) is finite


def test_runs_on_the_device_say_in_which_round_a_model_ended(make_algorithm, clients):
    algorithm = make_algorithm(
        policy=make_policy("flex"),
        uplink=Uplink(quarantine=False),
        local=LocalTraining(optax.sgd(1e30), batch_size=8),
    )
    _, reports = jax.jit(run_on_device(algorithm, 3))(algorithm.init(jax.random.key(0)), clients)
    assert reports.training.finite.tolist() == [False] * 3
    assert reports.training.void.tolist() == [False] * 3


def test_secret_noise_has_no_place_on_the_device(make_algorithm, clients):
    private = Uplink(clip=1.0, noise_multiplier=1.0)
    algorithm = make_algorithm(policy=make_policy("flex"), uplink=private)
    state = algorithm.init(jax.random.key(0))
    with pytest.raises(InputError, match="simulated_noise=False: "):
        jax.jit(run_on_device(algorithm, 1))(state, clients)
    simulated = private._replace(simulated_noise=True)
    algorithm = make_algorithm(policy=make_policy("flex"), uplink=simulated)
    state, _ = jax.jit(run_on_device(algorithm, 1))(state, clients)
    assert np.isfinite(state.shared["head"]["bias"]).all()
