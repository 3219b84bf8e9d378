from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.assignment import load_bounds, make_policy, update_deficit
from flexmoe_jax.errors import InputError
from flexmoe_jax.server import FitnessOptions, make_load_model
from flexmoe_jax.simulation import (
    DeviceReport,
    Floor,
    Simulation,
    Tampering,
    make_plan,
    round_on_device,
    run_on_device,
    slots_assignment,
)
from flexmoe_jax.simulation.on_device import device_load_bounds, device_plan, draw_cohort
from flexmoe_jax.types import State
from tests.conftest import CAPACITY
from tests.simulation.conftest import DEEP, EXPERTS, plain

ROUNDS, PER_ROUND, SLACK, SEEDS = 12, 5, 0.1, 3
# Padded to 6 rows: blocks of 2 clients.
PADDED = 6


class Run(NamedTuple):
    state: State
    reports: DeviceReport  # (T, ...)


@pytest.fixture(scope="module")
def flexible(make_simulation) -> Simulation:
    return make_simulation(
        policy=make_policy("flex", slack=SLACK),
        block_size=2,
        fitness=FitnessOptions(optimism=0.1),
    )


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(5), SEEDS)


@pytest.fixture(scope="module")
def scan(flexible):
    return jax.jit(run_on_device(flexible, ROUNDS, per_round=PER_ROUND))


@pytest.fixture(scope="module")
def runs(flexible, clients, scan, keys) -> list[Run]:
    """One scanned run for each seed."""
    return [Run(*scan(flexible.init(key), clients)) for key in keys]


def assert_equal_runs(one: Run, other: Run) -> None:
    chex.assert_trees_all_equal(one.reports.plan, other.reports.plan)
    books = [
        (run.state.clients.slots, run.state.server.round, ledger.held_rounds, ledger.load)
        for run in (one, other)
        for ledger in [run.state.server.ledger]
    ]
    chex.assert_trees_all_equal(*books)
    floats = [(plain(run.state), run.reports) for run in (one, other)]
    chex.assert_trees_all_close(*floats, atol=1e-4, rtol=1e-4)


def test_a_scanned_run_is_its_rounds_one_at_a_time(flexible, clients, keys, runs):
    one_round = jax.jit(round_on_device(flexible, per_round=PER_ROUND))
    state, reports = flexible.init(keys[0]), []
    for _ in range(ROUNDS):
        state, report = one_round(state, clients)
        reports.append(jax.device_get(report))
    assert one_round._cache_size() == 1
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *reports)
    assert int(state.server.round) == ROUNDS
    assert_equal_runs(runs[0], Run(state, stacked))


def test_vmapped_seeds_are_their_runs_one_by_one(flexible, clients, keys, runs):
    run = run_on_device(flexible, ROUNDS, per_round=PER_ROUND)
    begun = jax.jit(jax.vmap(flexible.init))(keys)
    together = Run(*jax.jit(jax.vmap(run, (0, None)))(begun, clients))
    of_seed = jax.jit(lambda runs, seed: jax.tree.map(lambda x: x[seed], runs))
    for seed, alone in enumerate(runs):
        assert_equal_runs(alone, of_seed(together, seed))
    cohorts = np.asarray(together.reports.plan.clients)
    assert (cohorts[0] != cohorts[1]).any()


def test_capacities_and_load_bounds_hold_in_every_round(runs):
    for run in runs:
        reports = jax.device_get(run.reports)
        deficit = np.zeros(EXPERTS)
        for t in range(ROUNDS):
            plan = jax.tree.map(lambda x, t=t: x[t], reports.plan)
            cohort = plan.clients[plan.clients < len(CAPACITY)]
            assert len(plan.clients) == PADDED
            assert len(set(cohort)) == PER_ROUND
            held, load = slots_assignment(plan.slots[:, 0], EXPERTS), plan.load[0]
            assert (held[:PER_ROUND].sum(axis=1) == CAPACITY[cohort]).all()
            assert (load == held.sum(axis=0)).all()
            low, high = load_bounds(CAPACITY[cohort], deficit, slack=SLACK)
            assert (reports.load_min[t] == low).all()
            assert (reports.load_max[t] == high).all()
            assert (low <= load).all()
            assert (load <= high).all()
            deficit = update_deficit(deficit, load)
        assert np.allclose(run.state.server.ledger.deficit, [deficit], atol=1e-4)


def test_assigned_loads_even_out_and_fitness_is_well_served(runs):
    for run in runs:
        load = run.state.server.ledger.load[0]
        assert load.max() - load.min() <= 2
        assert load.std() / load.mean() < 0.03
        gap = (run.reports.bound - run.reports.value) / run.reports.value
        assert (gap >= 0).all()
        assert (gap < 0.05).all()


def test_training_happens(runs):
    for run in runs:
        loss = np.asarray(run.reports.training.loss).sum(axis=1) / PER_ROUND
        assert loss[-1] < 0.5 * loss[0]
        assert (np.asarray(run.reports.training.examples) > 0).sum() == ROUNDS * PER_ROUND


def test_a_run_touches_no_host_and_compiles_once(flexible, clients, keys, scan, runs):
    state = flexible.init(keys[0])
    with jax.transfer_guard("disallow"):
        again = jax.block_until_ready(scan(state, clients))
    chex.assert_trees_all_equal(Run(*again).reports.plan, runs[0].reports.plan)
    assert scan._cache_size() == 1


bounds_on_device = jax.jit(device_load_bounds)


@pytest.mark.parametrize("experts", [2, 5])
@given(data=st.data())
def test_load_bounds_are_the_hosts(experts, data):
    def integers(least, most, count):
        numbers = st.lists(st.integers(least, most), min_size=count, max_size=count)
        return np.array(data.draw(numbers))

    capacity = integers(0, experts, 6)
    deficit = integers(-6, 6, experts).astype(float)
    deficit -= deficit.mean()
    slack = data.draw(st.sampled_from([0.0, 0.1, 0.5, 2.0]))
    # The device is given the deficit with its rounding errors, the host without.
    low, high = bounds_on_device(jnp.asarray(capacity), jnp.asarray(deficit, jnp.float32), slack)
    expected = load_bounds(capacity, deficit, slack=slack)
    assert np.array_equal((low, high), expected)
    assert float(low.sum()) <= capacity.sum() <= float(high.sum())


@pytest.mark.parametrize(("block_size", "devices"), [(1, 1), (3, 1), (2, 2)])
def test_plans_are_the_hosts(block_size, devices):
    rng = np.random.default_rng(block_size)
    cohort = np.sort(rng.choice(9, 5, replace=False)).astype(np.int32)
    assignment = rng.random((5, EXPERTS)) < 0.5
    floor = Floor(clients=9, slots=EXPERTS, rows=5, block_size=block_size, devices=devices)
    steps, load = np.array([2, 7, 7, 1, 2]), assignment.sum(axis=0).astype(np.float32)
    expected = make_plan(cohort, assignment[:, None], load[None], floor, steps, Tampering())
    plan = jax.jit(device_plan, static_argnums=4)(cohort, assignment, load, steps, floor)
    chex.assert_trees_all_equal(plan, expected)
    chex.assert_trees_all_equal_dtypes(plan, expected)


def test_cohorts_are_uniform_and_without_replacement():
    draw = jax.jit(jax.vmap(lambda key: draw_cohort(key, 7, 3)))
    cohorts = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    assert (np.diff(cohorts, axis=1) > 0).all()
    # Each client is in 3/7 of the cohorts, give or take 4 standard deviations.
    share = np.bincount(cohorts.ravel(), minlength=7) / 2000
    assert np.allclose(share, 3 / 7, atol=4 * np.sqrt(3 / 7 * 4 / 7 / 2000))
    assert draw_cohort(jax.random.key(0), 7, 7).tolist() == list(range(7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"rounds": 1, "per_round": 8}, "per_round=8: give 0 \\(all\\) to 7"),
    ],
)
def test_numbers_out_of_range_are_refused(flexible, options, message):
    with pytest.raises(InputError, match=message):
        run_on_device(flexible, **options)


def test_what_the_device_would_leave_out_is_refused(make_simulation):
    samples = make_load_model("samples", CAPACITY, CAPACITY)
    with pytest.raises(InputError, match=r"assignment.load=weighted: .* clients"):
        run_on_device(make_simulation(load=samples), 2)
    with pytest.raises(InputError, match=r"assignment.layers=each: on the device give same"):
        run_on_device(make_simulation(model=DEEP, layers="each"), 2)
    for policy, line in (
        (make_policy("random"), r"assignment\.policy=random: "),
        (lambda request: None, r"assignment\.policy=a function of the host: "),
        (make_policy("flex", diversity=2.0), r"assignment\.diversity=2\.0: "),
        (make_policy("flex", share=np.full(EXPERTS, 0.25)), r"assignment\.share=.*: not on the"),
    ):
        with pytest.raises(InputError, match=line):
            run_on_device(make_simulation(policy=policy), 2)


def test_exploration_moves_holders_on_the_device_too(make_simulation, clients):
    # Fitness stays what it was, and no load bound holds: without it, so would the holders.
    def holders(rounds: int) -> list[bytes]:
        policy = make_policy("flex", slack=100.0, exploration=1.0, exploration_rounds=rounds)
        flexible = make_simulation(policy=policy, fitness=FitnessOptions(beta=1e-9))
        key = jax.random.key(0)
        state = flexible.init(key)
        ledger = state.server.ledger
        ranked = jax.random.permutation(key, ledger.fitness.size).reshape(ledger.fitness.shape)
        fitness = ranked.astype(jnp.float32) / 100.0
        server = state.server._replace(ledger=ledger._replace(fitness=fitness))
        run = jax.jit(run_on_device(flexible, 4))
        plans = run(state._replace(server=server), clients)[1].plan.slots
        return [row.tobytes() for row in np.asarray(plans)]

    assert len(set(holders(0))) == 4
    first, second, third, fourth = holders(2)
    assert len({first, second, third}) == 3
    assert third == fourth
