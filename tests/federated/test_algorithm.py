from __future__ import annotations

import dataclasses
from functools import partial

import chex
import jax
import numpy as np
import optax
import pytest

from flexmoe_jax import federated, models
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.data import crop_flip, feed_cohorts
from flexmoe_jax.errors import InputError
from flexmoe_jax.federated import (
    Arrival,
    FitnessOptions,
    LocalTraining,
    Uplink,
    sample_cohort,
    slots_assignment,
    trimmed_mean,
)
from flexmoe_jax.types import Params
from tests.federated.conftest import CAPACITY, EXPERTS, prepare

# Training that draws random numbers wherever it can.
RANDOM = LocalTraining(optax.sgd(0.1), epochs=2, batch_size=8, augment=crop_flip)


def run(algorithm, data, rounds=3, per_round=7, seed=0):
    state = algorithm.init(jax.random.key(seed))
    reports = []
    feed = data if callable(data) else lambda cohort: data
    for t in range(rounds):
        cohort = sample_cohort(len(CAPACITY), per_round, seed=seed, round_index=t)
        solution = algorithm.assign(state, cohort)
        state, report = algorithm.round(state, feed(cohort), algorithm.plan(cohort, solution))
        reports.append((cohort, solution, jax.device_get(report)))
    return state, reports


def test_block_size_changes_nothing_beyond_rounding(make_algorithm, clients):
    states = [run(make_algorithm(block_size=size, local=RANDOM), clients)[0] for size in (1, 3)]
    for other in states[1:]:
        chex.assert_trees_all_equal(states[0].slots, other.slots)
        for name in ("shared", "experts", "gates", "fitness", "usage", "load", "norms"):
            chex.assert_trees_all_close(
                getattr(states[0], name), getattr(other, name), atol=1e-5, rtol=1e-5
            )


@pytest.fixture(scope="module")
def alone(make_algorithm, clients):
    return run(make_algorithm(block_size=1, local=RANDOM), clients)[0]


@pytest.mark.parametrize(("devices", "block_size"), [(2, 2), (4, 1), (8, 1)])
def test_devices_change_nothing_beyond_rounding(
    make_algorithm, clients, alone, devices, block_size
):
    mesh = federated.client_mesh(devices)
    algorithm = make_algorithm(block_size=block_size, mesh=mesh, local=RANDOM)
    shared = run(algorithm, federated.replicate(clients, mesh))[0]
    chex.assert_trees_all_equal(alone.slots, shared.slots)
    for name in ("shared", "experts", "gates", "fitness", "usage", "load"):
        chex.assert_trees_all_close(
            jax.device_get(getattr(alone, name)),
            jax.device_get(getattr(shared, name)),
            atol=1e-5,
            rtol=1e-5,
        )


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match=r"execution.devices=9: give 0 \(all\) to 8"):
        federated.client_mesh(9)


def test_the_order_of_the_cohort_changes_nothing_beyond_rounding(make_algorithm, clients):
    algorithm = make_algorithm(policy=make_policy("flex", solver="relaxation"))
    finals = []
    for order in (np.arange(7), np.array([3, 0, 6, 1, 5, 2, 4])):
        state = algorithm.init(jax.random.key(0))
        for _ in range(2):
            solution = algorithm.assign(state, order)
            state, _ = algorithm.round(state, clients, algorithm.plan(order, solution))
        finals.append(state)
    chex.assert_trees_all_equal(finals[0].slots, finals[1].slots)
    chex.assert_trees_all_close(finals[0].shared, finals[1].shared, atol=1e-6)
    chex.assert_trees_all_close(finals[0].gates, finals[1].gates, atol=1e-6)


def test_the_same_seed_gives_the_same_numbers(make_algorithm, clients):
    one, two = (run(make_algorithm(), clients)[0] for _ in range(2))
    chex.assert_trees_all_equal(
        (one.shared, one.experts, one.gates, one.fitness),
        (two.shared, two.experts, two.gates, two.fitness),
    )
    other = run(make_algorithm(), clients, seed=1)[0]
    assert not np.allclose(one.fitness, other.fitness)


def test_one_compilation_whatever_the_cohort_and_the_assignment(make_algorithm, clients):
    algorithm = make_algorithm()
    _, reports = run(algorithm, clients, rounds=5, per_round=4)
    cohorts = {tuple(cohort) for cohort, _, _ in reports}
    assignments = {solution.assignment.tobytes() for _, solution, _ in reports}
    assert len(cohorts) > 1
    assert len(assignments) > 1
    assert len({tuple(CAPACITY[list(cohort)]) for cohort in cohorts}) > 1
    assert algorithm.round._cache_size() == 1


def test_cohorts_fed_from_the_host_train_as_on_the_data_of_all(make_algorithm, clients):
    # And no cohort compiles the round anew.
    algorithm = make_algorithm()
    resident, _ = run(algorithm, clients, per_round=3)
    feed = feed_cohorts(jax.tree.map(np.asarray, clients), most=3)
    assert feed(np.arange(3)).images.shape[0] < clients.images.shape[0]
    fed, _ = run(algorithm, feed, rounds=3, per_round=3)
    chex.assert_trees_all_equal(resident, fed)
    assert algorithm.round._cache_size() == 2


def test_a_round_needs_no_hidden_transfer(make_algorithm, clients):
    algorithm = make_algorithm()
    state, cohort = algorithm.init(jax.random.key(0)), np.arange(7)
    plan = algorithm.plan(cohort, algorithm.assign(state, cohort))
    with jax.transfer_guard("disallow"):
        state, _ = algorithm.round(state, clients, plan)


def test_who_sat_out_is_untouched(make_algorithm, clients):
    algorithm = make_algorithm()
    state = algorithm.init(jax.random.key(0))
    before = jax.device_get((state.gates, state.fitness, state.experts))
    cohort = np.array([0, 2])  # capacities 1 and 2: one expert at least is left over
    solution = algorithm.assign(state, cohort)
    state, report = algorithm.round(state, clients, algorithm.plan(cohort, solution))
    out = np.setdiff1d(np.arange(7), cohort)
    for old, new in zip(
        jax.tree.leaves(before[0]), jax.tree.leaves(jax.device_get(state.gates)), strict=True
    ):
        assert (old[out] == new[out]).all()
        assert (old[cohort] != new[cohort]).any()
        # Of the cohort's gates, the columns of experts not held are as they were, too.
        assert (old[cohort][~solution.assignment] == new[cohort][~solution.assignment]).all()
    # Fitness is learnt for the pairs that were held and used, and for no other.
    used = np.asarray(state.usage) > 0
    assert used[cohort].any(axis=1).all()
    assert not used[cohort][~solution.assignment].any()
    assert ((np.asarray(state.fitness) != before[1]) <= used).all()
    assert (np.asarray(state.slots)[out] == EXPERTS).all()
    unheld = ~solution.assignment.any(axis=0)
    assert unheld.any()
    for old, new in zip(
        jax.tree.leaves(before[2]), jax.tree.leaves(jax.device_get(state.experts)), strict=True
    ):
        assert (old[unheld] == new[unheld]).all()
    assert report.usage[unheld].sum() == 0


def test_fitness_is_the_training_accuracy_of_each_pair(make_algorithm, clients):
    """By a plain loop: with a learning rate of 0 a client's model is the one it started with."""
    still = LocalTraining(optax.sgd(0.0), epochs=1, batch_size=8)
    algorithm = make_algorithm(local=still, fitness=FitnessOptions(beta=0.5, initial=0.2))
    start = algorithm.init(jax.random.key(0))
    model = models.MoEClassifier(models.MLP((16,)), classes=10, experts=EXPERTS, hidden=8)
    gates = jax.device_get(start.gates)
    shared, experts = jax.device_get((start.shared, start.experts))
    state, [(cohort, solution, _)] = run(algorithm, clients, rounds=1)
    expected = np.full((7, EXPERTS), 0.2)
    apply = jax.jit(model.apply)
    for client, held in zip(cohort, solution.assignment, strict=True):
        # All clients' padded rows have one shape, and compile once.
        rows, size = np.asarray(clients.index[client]), int(clients.size[client])
        gate = jax.tree.map(lambda leaf, client=client: leaf[client], gates)
        params = models.merge_params(Params(shared, experts, gate, private={}))
        logits, routing = apply({"params": params}, prepare(clients.images[rows]), held)
        hit = np.asarray(logits.argmax(axis=1) == clients.labels[rows])[:size]
        for e in np.flatnonzero(held):
            routed = np.asarray(routing.selected[:size, e])
            if routed.any():
                expected[client, e] = 0.5 * 0.2 + 0.5 * hit[routed].mean()
    assert np.allclose(state.fitness, expected, atol=1e-6)
    assert len(np.unique(expected)) > 4


def test_the_books_balance(make_algorithm, clients):
    state, reports = run(make_algorithm(), clients, rounds=4, per_round=5)
    sizes = np.asarray(clients.size)
    examples = sum(2 * sizes[cohort].sum() for cohort, _, _ in reports)  # 2 epochs
    assert float(state.usage.sum()) == examples
    assert sum(report.examples.sum() for _, _, report in reports) == examples
    held = sum(solution.assignment.sum() for _, solution, _ in reports)
    assert int(state.held_rounds.sum()) == held
    load = sum(solution.load for _, solution, _ in reports)
    assert np.allclose(state.load, load)
    # Owed: an even share of all load so far, less what was given.
    assert np.allclose(state.deficit, load.mean() - load, atol=1e-4)
    cohort, solution, _ = reports[-1]
    latest = slots_assignment(np.asarray(state.slots), EXPERTS)
    assert (latest[cohort] == solution.assignment).all()
    assert (solution.assignment.sum(axis=1) == CAPACITY[cohort]).all()


def test_loads_keep_to_the_shares_they_are_meant_to_have(make_algorithm, clients):
    # Half of 13 holders a round for expert 0: deficits make up for what does not divide.
    share = np.array([3.0, 1.0, 1.0, 1.0])
    algorithm = make_algorithm(policy=make_policy("flex", share=share), share=share)
    state, _ = run(algorithm, clients, rounds=6)
    assert np.abs(np.asarray(state.load) - 6 * CAPACITY.sum() * share / share.sum()).max() <= 1


def test_optimism_sends_clients_to_what_they_never_tried(make_algorithm, clients):
    hopeful = FitnessOptions(initial=0.0, optimism=9.0)
    algorithm = make_algorithm(policy=make_policy("greedy"), fitness=hopeful)
    state, _ = run(algorithm, clients, rounds=4)
    assert (state.held_rounds > 0).all()  # capacity 1 tries all 4 experts in 4 rounds
    settled = make_algorithm(policy=make_policy("greedy"), fitness=FitnessOptions(initial=0.0))
    plain, _ = run(settled, clients, rounds=4)
    assert not (plain.held_rounds > 0).all()


@pytest.mark.parametrize("server", [optax.sgd(0.5), optax.adam(0.01)])
def test_any_server_optimizer(make_algorithm, clients, server):
    state, reports = run(make_algorithm(server=server), clients, rounds=2)
    assert np.isfinite(reports[-1][2].loss).all()
    moved = jax.tree.leaves(state.expert_optimizer)
    assert all(leaf.shape[0] == EXPERTS for leaf in moved)


def test_half_the_server_step_moves_half_as_far(make_algorithm, clients):
    start = make_algorithm().init(jax.random.key(0)).shared
    whole = run(make_algorithm(), clients, rounds=1)[0].shared
    half = run(make_algorithm(server=optax.sgd(0.5)), clients, rounds=1)[0].shared
    for a, b, c in zip(*map(jax.tree.leaves, (start, whole, half)), strict=True):
        chex.assert_trees_all_close(c, a + 0.5 * (b - a), atol=1e-6)


def test_a_diverging_client_shows_in_the_report(make_algorithm, clients):
    diverging = LocalTraining(optax.sgd(1e30), batch_size=8)
    algorithm = make_algorithm(local=diverging, uplink=Uplink(quarantine=False))
    _, reports = run(algorithm, clients, rounds=1)
    assert not np.isfinite(reports[0][2].loss).all()
    state, reports = run(make_algorithm(local=diverging), clients, rounds=1)
    assert reports[0][2].quarantined.all()
    start = make_algorithm().init(jax.random.key(0))
    for name in ("shared", "experts", "gates", "fitness", "usage"):
        chex.assert_trees_all_equal(getattr(state, name), getattr(start, name))


def test_clients_that_do_not_deliver_leave_no_trace(make_algorithm, clients):
    """As if they had not been asked, but that they hold what they were sent."""
    algorithm = make_algorithm(rows=7)
    state = algorithm.init(jax.random.key(0))
    cohort = np.arange(7, dtype=np.int32)
    solution = algorithm.assign(state, cohort)
    work = np.array([1.0, 0, 1, 0, 0, 1, 1])
    arrival = Arrival(work, reached=np.ones(7, bool), tamper=np.ones(7))
    some, report = algorithm.round(state, clients, algorithm.plan(cohort, solution, arrival))
    assert sorted(np.asarray(report.examples) > 0) == sorted(work > 0)

    there = work > 0
    fewer = dataclasses.replace(solution, assignment=solution.assignment[there])
    others, _ = algorithm.round(
        algorithm.init(jax.random.key(0)), clients, algorithm.plan(cohort[there], fewer)
    )
    for name in ("shared", "experts", "gates", "fitness", "usage", "held_rounds", "deficit"):
        chex.assert_trees_all_equal(getattr(some, name), getattr(others, name))
    assert (np.asarray(some.slots)[:, 0] < EXPERTS).all()
    assert ((np.asarray(others.slots)[:, 0] < EXPERTS) == there).all()

    # A round in which nobody can be reached changes nothing but its number.
    before = jax.device_get(others._replace(key=0, round=0))
    nobody = np.zeros(0, np.int32)
    solution = algorithm.assign(others, nobody)
    after, report = algorithm.round(others, clients, algorithm.plan(nobody, solution))
    assert not np.asarray(report.examples).any()
    chex.assert_trees_all_equal(jax.device_get(after._replace(key=0, round=0)), before)
    assert algorithm.round._cache_size() == 1


def test_partial_work_is_that_many_steps(make_algorithm, clients):
    algorithm = make_algorithm()
    state = algorithm.init(jax.random.key(0))
    cohort = np.arange(7, dtype=np.int32)
    arrival = Arrival(np.full(7, 0.5), np.ones(7, bool), np.ones(7))
    plan = algorithm.plan(cohort, algorithm.assign(state, cohort), arrival)
    whole = algorithm.setting.steps[np.asarray(plan.clients)]
    assert np.array_equal(plan.steps, whole // 2)
    _, report = algorithm.round(state, clients, plan)
    size = np.asarray(clients.size)[np.asarray(plan.clients)]
    per_epoch = -(-size // 8)
    done = np.minimum(whole // 2, per_epoch)  # of the first of two epochs
    again = whole // 2 - done
    expected = np.minimum(8 * done, size) + np.minimum(8 * again, size)
    assert np.array_equal(report.examples, expected)


def test_robust_means_withstand_a_client_that_blows_its_update_up(make_algorithm, clients):
    cohort = np.arange(7, dtype=np.int32)
    moved = {}
    for name, aggregator in (("mean", None), ("robust", partial(trimmed_mean, trim=0.2))):
        # Everybody holds everything, so that every expert has several holders.
        algorithm = make_algorithm(
            aggregator=aggregator,
            uplink=Uplink(quarantine=False),
            capacity=np.full(7, EXPERTS),
            policy=make_policy("full"),
        )
        for factor in (1.0, -1e6):
            state = algorithm.init(jax.random.key(0))
            start = jax.device_get(state.shared)
            arrival = Arrival(np.ones(7), np.ones(7, bool), np.array([1, 1, factor, 1, 1, 1, 1]))
            plan = algorithm.plan(cohort, algorithm.assign(state, cohort), arrival)
            state, _ = algorithm.round(state, clients, plan)
            moved[name, factor] = max(
                float(np.abs(a - b).max())
                for a, b in zip(*map(jax.tree.leaves, (state.shared, start)), strict=True)
            )
    # No honest client moves a parameter by 1; a mean follows the one that blew its update up.
    assert moved["robust", -1e6] < 1 < 1e3 < moved["mean", -1e6]


def test_compiled_ahead_it_is_the_same_algorithm(make_algorithm, clients, digits):
    test = federated.chunk_test_set(digits.test_images, digits.test_labels)
    plain = make_algorithm()
    ahead = federated.compile_ahead(plain, clients, test, per_round=7)
    states = [run(algorithm, clients)[0] for algorithm in (plain, ahead)]
    chex.assert_trees_all_equal(states[0].slots, states[1].slots)
    chex.assert_trees_all_close(
        *(s._replace(key=jax.random.key_data(s.key)) for s in states), atol=1e-5, rtol=1e-5
    )
    chex.assert_trees_all_close(
        *(
            a.evaluate(s, test, clients.label_share)
            for a, s in zip((plain, ahead), states, strict=True)
        ),
        atol=0.011,  # an example more or less
    )


def test_what_is_private_never_meets_another_client(make_algorithm, clients):
    """Without a federation a client learns the same whoever else takes part."""
    alone = {
        "ownership": models.Ownership(("backbone", "expert", "head")),
        "capacity": np.full(7, EXPERTS),
        "policy": make_policy("full"),
        "rows": 7,
    }
    algorithm = make_algorithm(**alone)
    finals = []
    for cohort in (np.arange(7, dtype=np.int32), np.array([2, 5], np.int32)):
        state = algorithm.init(jax.random.key(0))
        assert state.shared == state.experts == {}
        for _ in range(2):
            plan = algorithm.plan(cohort, algorithm.assign(state, cohort))
            state, _ = algorithm.round(state, clients, plan)
        finals.append(jax.device_get((state.private, state.gates)))
    for all_of_them, two in zip(*map(jax.tree.leaves, finals), strict=True):
        chex.assert_trees_all_close(all_of_them[[2, 5]], two[[2, 5]], atol=1e-5)
        assert np.abs(all_of_them[0] - two[0]).max() > 0  # client 0 took no part the second time


def test_a_shared_gate_travels_with_its_expert(make_algorithm, clients):
    shared = models.Ownership(shared_gate=True)
    state, _ = run(make_algorithm(ownership=shared), clients)
    assert state.gates == {}
    assert set(state.experts) == {"expert", "gate"}
    start = make_algorithm(ownership=shared).init(jax.random.key(0))
    moved = np.abs(state.experts["gate"]["kernel"] - start.experts["gate"]["kernel"]).max(axis=1)
    used = np.asarray(state.usage).sum(axis=0) > 0
    assert ((moved > 0) == used).all()


def test_own_backbones_are_evaluated_for_each_client(make_algorithm, clients, digits):
    """A private backbone gives what the shared one gives, as long as nobody has trained it."""
    test = federated.chunk_test_set(digits.test_images[:60], digits.test_labels[:60])
    found = []
    for ownership in (models.FLEX_MOE, models.Ownership(("backbone",))):
        algorithm = make_algorithm(ownership=ownership)
        state = algorithm.init(jax.random.key(0))
        slots = np.arange(7)[:, None] % EXPERTS * np.ones((1, 3), int)
        slots[:, 1:] = EXPERTS
        state = state._replace(slots=jax.numpy.asarray(slots, jax.numpy.int32))
        found.append(jax.device_get(algorithm.evaluate(state, test, clients.label_share)))
    chex.assert_trees_all_close(found[0], found[1], atol=1e-6)
    assert found[0].evaluated.all()
