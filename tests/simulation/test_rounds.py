from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import models, simulation
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.client import LocalTraining
from flexmoe_jax.data import crop_flip, feed_cohorts
from flexmoe_jax.server import FitnessOptions
from flexmoe_jax.simulation import Arrival, initial, sample_cohort, slots_assignment
from flexmoe_jax.types import Params
from tests.conftest import CAPACITY
from tests.simulation.conftest import EXPERTS, MODULE, plain, prepare


def crop_flip_images(batch, bits):
    return batch | {"images": crop_flip(batch["images"], bits)}


# Training that draws random numbers wherever it can.
RANDOM = LocalTraining(
    optax.sgd(0.1), balance=0.0, epochs=2, batch_size=8, augment=crop_flip_images
)


def run(simulated, data, rounds=3, per_round=7, seed=0):
    state = simulated.init(jax.random.key(seed))
    reports = []
    feed = data if callable(data) else lambda cohort: data
    for t in range(rounds):
        cohort = sample_cohort(len(CAPACITY), per_round, seed=seed, round_index=t)
        solutions = simulated.assign(state, cohort)
        state, report = simulated.round(state, feed(cohort), simulated.plan(cohort, solutions))
        reports.append((cohort, solutions[0], jax.device_get(report)))
    return state, reports


def learnt(state):
    """Returns the part of the state that a round without any delivery leaves unchanged."""
    ledger = state.server.ledger
    return jax.device_get(
        (
            (state.server.shared, state.server.experts, state.clients.gates),
            (ledger.fitness, ledger.usage, ledger.held_rounds, ledger.deficit),
        )
    )


@pytest.fixture(scope="module")
def alone(make_simulation, clients):
    return run(make_simulation(block_size=1, local=RANDOM), clients)[0]


def test_block_size_changes_nothing_beyond_rounding(make_simulation, clients, alone):
    other = run(make_simulation(block_size=3, local=RANDOM), clients)[0]
    chex.assert_trees_all_equal(alone.clients.slots, other.clients.slots)
    chex.assert_trees_all_close(plain(alone), plain(other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("devices", "block_size"), [(2, 2), (7, 1), (8, 1)])
def test_devices_change_nothing_beyond_rounding(
    make_simulation, clients, alone, devices, block_size
):
    mesh = simulation.client_mesh(devices)
    simulated = make_simulation(block_size=block_size, mesh=mesh, local=RANDOM)
    shared = run(simulated, simulation.replicate(clients, mesh))[0]
    chex.assert_trees_all_equal(*(jax.device_get(s.clients.slots) for s in (alone, shared)))
    chex.assert_trees_all_close(plain(alone), plain(shared), atol=1e-5, rtol=1e-5)
    # Each device has what an equal share of the clients own, where there is one.
    rows = {
        leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(shared.clients.gates)
    }
    assert rows == {1 if devices == 7 else 7}


def test_many_clients_own_what_each_would_draw_alone(make_simulation):
    # More than are drawn side by side, and not a multiple of these.
    numbers = np.arange(700)
    federation = make_simulation().setting.federation
    own = jax.jit(lambda few: initial.init_owns(federation, jax.random.key(0), few)[1])
    owned = jax.device_get(own(numbers))
    for number in (0, 255, 256, 699):
        alone = own(numbers[number : number + 1])
        chex.assert_trees_all_equal(jax.tree.map(lambda x, n=number: x[n : n + 1], owned), alone)


def test_the_order_of_the_cohort_changes_nothing_beyond_rounding(make_simulation, clients):
    simulated = make_simulation(policy=make_policy("flex", solver="relaxation"))
    finals = []
    for order in (np.arange(7), np.array([3, 0, 6, 1, 5, 2, 4])):
        state = simulated.init(jax.random.key(0))
        for _ in range(2):
            plan = simulated.plan(order, simulated.assign(state, order))
            state, _ = simulated.round(state, clients, plan)
        finals.append(state)
    chex.assert_trees_all_equal(finals[0].clients.slots, finals[1].clients.slots)
    chex.assert_trees_all_close(plain(finals[0]), plain(finals[1]), atol=1e-6)


def test_the_same_seed_gives_the_same_numbers(make_simulation, simulated, clients):
    one, two = (run(again, clients)[0] for again in (make_simulation(own=True), simulated))
    chex.assert_trees_all_equal(plain(one), plain(two))
    other = run(simulated, clients, seed=1)[0]
    assert not np.allclose(one.server.ledger.fitness, other.server.ledger.fitness)


def test_one_compilation_whatever_the_cohort_and_the_assignment(make_simulation, clients):
    simulated = make_simulation(own=True)
    _, reports = run(simulated, clients, rounds=5, per_round=4)
    cohorts = {tuple(cohort) for cohort, _, _ in reports}
    assignments = {solution.assignment.tobytes() for _, solution, _ in reports}
    assert len(cohorts) > 1
    assert len(assignments) > 1
    assert len({tuple(CAPACITY[list(cohort)]) for cohort in cohorts}) > 1
    assert simulated.round._cache_size() == 1


def test_cohorts_fed_from_the_host_train_as_on_the_data_of_all(make_simulation, clients):
    # And no cohort compiles the round anew.
    simulated = make_simulation(own=True)
    resident, _ = run(simulated, clients, per_round=3)
    feed = feed_cohorts(jax.tree.map(np.asarray, clients), most=3)
    assert len(feed(np.arange(3)).arrays["images"]) < len(clients.arrays["images"])
    fed, _ = run(simulated, feed, rounds=3, per_round=3)
    chex.assert_trees_all_equal(plain(resident), plain(fed))
    assert simulated.round._cache_size() == 2


def test_a_round_needs_no_hidden_transfer(simulated, clients):
    state, cohort = simulated.init(jax.random.key(0)), np.arange(7)
    plan = simulated.plan(cohort, simulated.assign(state, cohort))
    with jax.transfer_guard("disallow"):
        state, _ = simulated.round(state, clients, plan)


def test_who_sat_out_is_untouched(simulated, clients):
    state = simulated.init(jax.random.key(0))
    before = plain(state)
    cohort = np.array([0, 2])  # capacities 1 and 2: one expert at least is left over
    solutions = simulated.assign(state, cohort)
    held = solutions[0].assignment
    state, report = simulated.round(state, clients, simulated.plan(cohort, solutions))
    after, report = plain(state), jax.device_get(report)
    out = np.setdiff1d(np.arange(7), cohort)
    for old, new in zip(
        *map(jax.tree.leaves, (before.clients.gates, after.clients.gates)), strict=True
    ):
        assert (old[out] == new[out]).all()
        assert (old[cohort] != new[cohort]).any()
        # Of the cohort's gates, the columns of experts not held are as they were, too.
        assert (old[cohort][~held] == new[cohort][~held]).all()
    # Fitness is learnt for the pairs that were held and used, and for no other.
    used = after.server.ledger.usage[0] > 0
    assert used[cohort].any(axis=1).all()
    assert not used[cohort][~held].any()
    changed = after.server.ledger.fitness[0] != before.server.ledger.fitness[0]
    assert (changed <= used).all()
    assert (after.clients.slots[out] == EXPERTS).all()
    unheld = ~held.any(axis=0)
    assert unheld.any()
    for old, new in zip(
        *map(jax.tree.leaves, (before.server.experts, after.server.experts)), strict=True
    ):
        assert (old[unheld] == new[unheld]).all()
    assert report.usage[0, unheld].sum() == 0


def test_fitness_is_the_training_accuracy_of_each_pair(make_simulation, clients):
    """Recounts with a plain loop: with learning rate 0 a client's model stays as it started."""
    still = LocalTraining(optax.sgd(0.0), balance=0.0, epochs=1, batch_size=8)
    simulated = make_simulation(local=still, fitness=FitnessOptions(beta=0.5, initial=0.2))
    layout = simulated.setting.federation.layout
    start = plain(simulated.init(jax.random.key(0)))
    state, [(cohort, solution, _)] = run(simulated, clients, rounds=1)
    expected = np.full((7, EXPERTS), 0.2)

    @jax.jit
    def apply(params, images, held):
        variables = {"params": params, "held": {"mask": held}}
        logits, kept = MODULE.apply(variables, prepare(images), mutable=["routing"])
        return logits, kept["routing"]["at"][0].selected

    known = jax.device_get(clients)
    for number, held in zip(cohort, solution.assignment, strict=True):
        # All clients' padded rows have one shape, and compile once.
        rows, size = known.index[number], int(known.size[number])
        gate = jax.tree.map(lambda leaf, number=number: leaf[number], start.clients.gates)
        params = layout.merge(Params(start.server.shared, start.server.experts, gate, {}))
        logits, selected = jax.device_get(apply(params, known.arrays["images"][rows], held))
        hit = (logits.argmax(axis=1) == known.arrays["labels"][rows])[:size]
        for e in np.flatnonzero(held):
            routed = selected[:size, e]
            if routed.any():
                expected[number, e] = 0.5 * 0.2 + 0.5 * hit[routed].mean()
    assert np.allclose(state.server.ledger.fitness[0], expected, atol=1e-6)
    assert len(np.unique(expected)) > 4


def test_the_books_balance(simulated, clients):
    state, reports = run(simulated, clients, rounds=4, per_round=5)
    books = jax.device_get(state.server.ledger._replace(norms=()))
    ledger = jax.tree.map(lambda table: table[0], books)
    sizes = np.asarray(clients.size)
    examples = sum(2 * sizes[cohort].sum() for cohort, _, _ in reports)  # 2 epochs
    assert float(ledger.usage.sum()) == examples
    assert sum(report.examples.sum() for _, _, report in reports) == examples
    assert sum(report.units.sum() for _, _, report in reports) == examples
    assert sum(report.usage.sum() for _, _, report in reports) == examples
    held = sum(solution.assignment.sum() for _, solution, _ in reports)
    assert int(ledger.held_rounds.sum()) == held
    load = sum(solution.load for _, solution, _ in reports)
    assert np.allclose(ledger.load, load)
    # Owed: an even share of all load so far, less what was given.
    assert np.allclose(ledger.deficit, load.mean() - load, atol=1e-4)
    cohort, solution, _ = reports[-1]
    latest = slots_assignment(np.asarray(state.clients.slots[:, 0]), EXPERTS)
    assert (latest[cohort] == solution.assignment).all()
    assert (solution.assignment.sum(axis=1) == CAPACITY[cohort]).all()


def test_loads_keep_to_the_shares_they_are_meant_to_have(make_simulation, clients):
    # Half of 13 holders a round for expert 0: deficits make up for what does not divide.
    share = np.array([3.0, 1.0, 1.0, 1.0])
    simulated = make_simulation(policy=make_policy("flex", share=share), share=share)
    state, _ = run(simulated, clients, rounds=6)
    wanted = 6 * CAPACITY.sum() * share / share.sum()
    assert np.abs(np.asarray(state.server.ledger.load[0]) - wanted).max() <= 1


def test_optimism_sends_clients_to_what_they_never_tried(make_simulation, clients):
    hopeful = FitnessOptions(initial=0.0, optimism=9.0)
    simulated = make_simulation(policy=make_policy("greedy"), fitness=hopeful)
    state, _ = run(simulated, clients, rounds=4)
    # Capacity 1 tries all 4 experts in 4 rounds.
    assert (state.server.ledger.held_rounds > 0).all()
    settled = make_simulation(policy=make_policy("greedy"), fitness=FitnessOptions(initial=0.0))
    calm, _ = run(settled, clients, rounds=4)
    assert not (calm.server.ledger.held_rounds > 0).all()


@pytest.mark.parametrize("optimizer", [optax.sgd(0.5), optax.adam(0.01)])
def test_any_server_optimizer(make_simulation, clients, optimizer):
    state, reports = run(make_simulation(optimizer=optimizer), clients, rounds=2)
    assert np.isfinite(reports[-1][2].loss).all()
    moved = jax.tree.leaves(state.server.optimizer[1])
    assert all(leaf.shape[0] == EXPERTS for leaf in moved)


def test_half_the_server_step_moves_half_as_far(make_simulation, simulated, clients):
    start = jax.device_get(simulated.init(jax.random.key(0)).server.shared)
    whole = run(simulated, clients, rounds=1)[0].server.shared
    half = run(make_simulation(optimizer=optax.sgd(0.5)), clients, rounds=1)[0].server.shared
    of_all = jax.device_get((start, whole, half))
    for a, b, c in zip(*map(jax.tree.leaves, of_all), strict=True):
        chex.assert_trees_all_close(c, a + 0.5 * (b - a), atol=1e-6)


def test_diverging_clients_are_refused(make_simulation, simulated, clients):
    diverging = LocalTraining(optax.sgd(1e30), balance=0.0, batch_size=8)
    state, reports = run(make_simulation(local=diverging), clients, rounds=1)
    assert reports[0][2].quarantined.all()
    chex.assert_trees_all_equal(learnt(state), learnt(simulated.init(jax.random.key(0))))


def test_clients_that_do_not_deliver_leave_no_trace(make_simulation, clients):
    """The state is as if they had not been asked, but they hold the experts they received."""
    simulated = make_simulation(rows=7, own=True)
    state = simulated.init(jax.random.key(0))
    cohort = np.arange(7, dtype=np.int32)
    (solution,) = simulated.assign(state, cohort)
    work = np.array([1.0, 0, 1, 0, 0, 1, 1])
    arrival = Arrival(work, reached=np.ones(7, bool), tamper=np.ones(7))
    plan = simulated.plan(cohort, (solution,), arrival)
    some, report = simulated.round(state, clients, plan)
    assert sorted(np.asarray(report.examples) > 0) == sorted(work > 0)

    there = work > 0
    fewer = dataclasses.replace(solution, assignment=solution.assignment[there])
    others, _ = simulated.round(
        simulated.init(jax.random.key(0)), clients, simulated.plan(cohort[there], (fewer,))
    )
    chex.assert_trees_all_equal(learnt(some), learnt(others))
    assert (np.asarray(some.clients.slots)[:, 0, 0] < EXPERTS).all()
    assert ((np.asarray(others.clients.slots)[:, 0, 0] < EXPERTS) == there).all()

    # A round in which no client can be reached changes only the round number.
    def but_for_the_round(state):
        return plain(state._replace(server=state.server._replace(round=0)))

    before = but_for_the_round(others)
    nobody = np.zeros(0, np.int32)
    plan = simulated.plan(nobody, simulated.assign(others, nobody))
    after, report = simulated.round(others, clients, plan)
    assert not np.asarray(report.examples).any()
    chex.assert_trees_all_equal(but_for_the_round(after), before)
    assert simulated.round._cache_size() == 1


def test_partial_work_is_that_many_steps(simulated, clients):
    state = simulated.init(jax.random.key(0))
    cohort = np.arange(7, dtype=np.int32)
    arrival = Arrival(np.full(7, 0.5), np.ones(7, bool), np.ones(7))
    plan = simulated.plan(cohort, simulated.assign(state, cohort), arrival)
    whole = simulated.setting.steps[np.asarray(plan.clients)]
    assert np.array_equal(plan.steps, whole // 2)
    _, report = simulated.round(state, clients, plan)
    size = np.asarray(clients.size)[np.asarray(plan.clients)]
    per_epoch = -(-size // 8)
    done = np.minimum(whole // 2, per_epoch)  # of the first of two epochs
    again = whole // 2 - done
    expected = np.minimum(8 * done, size) + np.minimum(8 * again, size)
    assert np.array_equal(report.examples, expected)


def test_compiled_ahead_it_is_the_same_simulation(simulated, clients, digits):
    arrays = {"images": digits.test_images, "labels": digits.test_labels}
    test = simulation.chunk_test_set(arrays)
    both = simulated, simulation.compile_ahead(simulated, clients, test, per_round=7)
    states = [run(each, clients)[0] for each in both]
    chex.assert_trees_all_equal(states[0].clients.slots, states[1].clients.slots)
    chex.assert_trees_all_close(*map(plain, states), atol=1e-5, rtol=1e-5)
    found = [
        jax.device_get(each.evaluate(state, test, clients.about))
        for each, state in zip(both, states, strict=True)
    ]
    chex.assert_trees_all_close(*found, atol=0.011, rtol=1e-4)
    # Also of other models than those that clients hold, and with data on the host.
    models = simulated.tune(states[0], clients)
    tuned = [each.evaluate(states[0], test, clients.about, models) for each in both]
    chex.assert_trees_all_equal(*map(jax.device_get, tuned))
    simulation.compile_ahead(simulated, jax.device_get(clients), test, per_round=7)


def test_cohorts_may_be_larger_than_planned_for_or_empty(make_simulation, clients):
    simulated = make_simulation(rows=2, block_size=6)
    state, everybody, nobody = simulated.init(jax.random.key(0)), np.arange(7), np.zeros(0, int)
    plan = simulated.plan(everybody, simulated.assign(state, everybody))
    state, report = simulated.round(state, clients, plan)
    assert (np.asarray(report.examples) > 0).sum() == 7
    plan = make_simulation().plan(nobody, simulated.assign(state, nobody))
    assert not np.asarray(plan.steps).any()


def test_what_is_private_never_meets_another_client(make_simulation, clients):
    """Without a federation a client learns the same whoever else takes part."""
    simulated = make_simulation(
        ownership=models.Ownership(("backbone", "expert", "head")),
        capacity=np.full(7, EXPERTS),
        policy=make_policy("full"),
        rows=7,
    )
    finals = []
    for cohort in (np.arange(7, dtype=np.int32), np.array([2, 5], np.int32)):
        state = simulated.init(jax.random.key(0))
        assert state.server.shared == state.server.experts == {}
        for _ in range(2):
            plan = simulated.plan(cohort, simulated.assign(state, cohort))
            state, _ = simulated.round(state, clients, plan)
        finals.append(jax.device_get((state.clients.private, state.clients.gates)))
    for all_of_them, two in zip(*map(jax.tree.leaves, finals), strict=True):
        chex.assert_trees_all_close(all_of_them[[2, 5]], two[[2, 5]], atol=1e-5)
        assert np.abs(all_of_them[0] - two[0]).max() > 0  # client 0 took no part the second time


def test_a_shared_gate_travels_with_its_expert(make_simulation, clients):
    simulated = make_simulation(ownership=models.Ownership(shared_gate=True))
    start = jax.device_get(simulated.init(jax.random.key(0)).server.experts["mixture"])
    state, _ = run(simulated, clients)
    assert state.clients.gates == {}
    experts = state.server.experts["mixture"]
    assert set(experts) == {"expert", "gate"}
    moved = np.abs(experts["gate"]["kernel"] - start["gate"]["kernel"]).max(axis=1)
    used = np.asarray(state.server.ledger.usage[0]).sum(axis=0) > 0
    assert ((moved > 0) == used).all()


def test_own_backbones_are_evaluated_for_each_client(make_simulation, clients, digits):
    """A private backbone gives the same output as the shared one until it is trained."""
    arrays = {"images": digits.test_images[:60], "labels": digits.test_labels[:60]}
    test = simulation.chunk_test_set(arrays)
    slots = np.full((7, 1, 3), EXPERTS, np.int32)
    slots[:, 0, 0] = np.arange(7) % EXPERTS
    found = []
    for ownership in (models.FLEX_MOE, models.Ownership(("backbone",))):
        simulated = make_simulation(ownership=ownership)
        assert simulated.setting.federation.shares_trunk == (ownership == models.FLEX_MOE)
        state = simulated.init(jax.random.key(0))
        state = state._replace(clients=state.clients._replace(slots=jnp.asarray(slots)))
        found.append(jax.device_get(simulated.evaluate(state, test, clients.about)))
    chex.assert_trees_all_close(found[0], found[1], atol=1e-6)
    assert found[0].evaluated.all()
