"""Affinity in a federation: experts go to clients whose data are alike, told by their updates."""

from __future__ import annotations

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import client, data, models, server, simulation, tasks
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.client import LocalTraining
from flexmoe_jax.errors import InputError
from flexmoe_jax.federation import Federation
from flexmoe_jax.simulation import Arrival
from tests.simulation.conftest import plain

EXPERTS, CLIENTS = 3, 12
KIND = np.arange(CLIENTS) % 3
KINDS = {tuple(kind == KIND) for kind in range(3)}
EVERYBODY = np.arange(CLIENTS, dtype=np.int32)


@pytest.fixture(scope="module")
def counting() -> data.ClientData:
    """Clients that count on in steps of 1, 2 or 5."""
    rng = np.random.default_rng(0)
    step = np.array([1, 2, 5])[KIND].repeat(16)[:, None]
    tokens = (np.arange(9) * step + rng.integers(16, size=step.shape)) % 16
    parts = np.split(np.arange(len(tokens)), CLIENTS)
    owns = KIND[:, None] == np.arange(3)
    return data.join({"tokens": tokens.astype(np.int32)}, parts, None, owns)


def federate(counting: data.ClientData, with_router: bool = False, **fitness) -> Federation:
    module = models.Transformer(
        EXPERTS, depth=1, width=16, heads=2, hidden=16, vocabulary=16, router=with_router
    )
    return Federation(
        model=models.decoder(module),
        sample={name: x[:2] for name, x in counting.arrays.items()},
        capacity=np.ones(CLIENTS, np.int64),
        policy=make_policy("flex", slack=0.0),
        local=LocalTraining(optax.adam(0.01), epochs=2, batch_size=8),
        task=tasks.next_token(),
        fitness=server.FitnessOptions(score="loss", initial=0.0, **fitness),
    )


def play(federation: Federation, counting: data.ClientData, rounds: int, refused: int = -1):
    simulated = simulation.simulate(federation, counting)
    state = simulated.init(jax.random.key(0))
    tamper = np.where(np.arange(CLIENTS) == refused, np.nan, 1.0)
    arrival = Arrival(np.ones(CLIENTS), np.ones(CLIENTS, bool), tamper)
    for _ in range(rounds):
        solutions = simulated.assign(state, EVERYBODY)
        plan = simulated.plan(EVERYBODY, solutions, arrival)
        state, _ = simulated.round(state, counting, plan)
    return state, simulated.assign(state, EVERYBODY)[0].assignment


@pytest.mark.parametrize("profile", ["updates", "given"])
def test_clients_of_a_kind_come_to_hold_one_expert(counting, profile):
    rounds = 6 if profile == "updates" else 0
    _, held = play(federate(counting, affinity=1.0, profile=profile), counting, rounds)
    assert {tuple(column) for column in held.T} == KINDS


def test_a_client_of_one_kind_is_told_to_use_one_of_its_two_experts(counting):
    federation = federate(counting, affinity=1.0, profile="given")
    # Half of the clients hold one expert, or pairs of kinds would explain pure kinds as well.
    capacity = np.where(EVERYBODY < CLIENTS // 2, 1, 2)
    federation = federation.replace(capacity=capacity)
    simulated = simulation.simulate(federation, counting)
    solutions = simulated.assign(simulated.init(jax.random.key(0)), EVERYBODY)
    (solution,) = solutions
    assert (solution.use[~solution.assignment] == 0).all()
    # Holders are even, so each expert is used as much as the others: by clients of its kind.
    assert solution.use.sum(axis=0) == pytest.approx(np.full(EXPERTS, CLIENTS / EXPERTS), abs=1e-2)
    assert (solution.use.max(axis=1) > 0.99).all()
    assert {tuple(kind == KIND) for kind in range(3)} == {tuple(u > 0.5) for u in solution.use.T}
    plan = jax.device_get(simulated.plan(EVERYBODY, solutions))
    filled = np.pad(solution.use, [(0, 0), (0, 1)])
    for number, (slots,), (use,) in zip(plan.clients, plan.slots, plan.use, strict=True):
        assert use == pytest.approx(filled[number, slots])
    # Whoever did not ask the server splits evenly; without affinity, or a loss, nothing is sent.
    even = jax.device_get(simulated.plan(EVERYBODY, (replace(solution, use=None),)))
    assert (even.use.sum(axis=2) == 1).all()
    assert set(even.use.ravel()) == {0, 0.5, 1}
    for silent in (
        federation.replace(fitness=server.FitnessOptions(score="loss")),
        federation.replace(local=replace(federation.local, balance=0.0)),
    ):
        simulated = simulation.simulate(silent, counting)
        solutions = simulated.assign(simulated.init(jax.random.key(0)), EVERYBODY)
        assert solutions[0].use is None
        assert simulated.plan(EVERYBODY, solutions).use is None


def test_what_is_refused_tells_nothing(counting):
    state, _ = play(federate(counting, affinity=1.0), counting, rounds=2, refused=4)
    profile = np.asarray(state.server.ledger.profile)
    assert profile.shape == (CLIENTS, 512)
    assert not profile[4].any()
    assert np.delete(profile, 4, axis=0).any(axis=1).all()


def test_nothing_is_kept_where_nobody_asks(counting):
    state, _ = play(federate(counting), counting, rounds=1)
    assert state.server.ledger.profile == ()


def test_what_is_known_beforehand_has_to_be_known(counting):
    unknown = counting.replace(owns=None)
    with pytest.raises(InputError, match=r"fitness\.profile=given: nothing is known"):
        simulation.simulate(federate(counting, affinity=1.0, profile="given"), unknown)


def test_exploration_ends_once_updates_show_kinds(counting):
    exploring = make_policy("flex", slack=0.0, exploration=100.0)
    by_kind = []
    for evidence in (0.25, 1.0):
        federation = federate(counting, affinity=1.0, evidence=evidence).replace(policy=exploring)
        _, held = play(federation, counting, rounds=6)
        by_kind.append(len({tuple(column) for column in held.T} & KINDS))
    assert by_kind[0] == 3
    assert by_kind[1] < 3


def test_less_evidence_is_enough_to_go_on(counting):
    """Once experts fit their clients, updates differ less; the kinds are the same."""
    state, _ = play(federate(counting, affinity=1.0, evidence=0.25), counting, rounds=7)
    assert state.server.ledger.alike

    def counts(evidence: float, alike: bool) -> bool:
        books = state.server.ledger._replace(alike=jnp.array(alike))
        known = state._replace(server=state.server._replace(ledger=books))
        asking = federate(counting, affinity=1.0, evidence=evidence)
        return simulation.simulate(asking, counting).assign(known, EVERYBODY)[0].alike

    least = next(e for e in (0.3, 0.4, 0.5, 0.6, 0.7) if not counts(e, alike=False))
    assert counts(least, alike=True)
    assert not counts(1.0, alike=True)


def test_without_labels_there_is_nothing_to_go_beyond(counting):
    (_, by_updates), (_, beyond) = (
        play(federate(counting, affinity=1.0, profile=profile), counting, rounds=3)
        for profile in ("updates", "beyond_labels")
    )
    np.testing.assert_array_equal(by_updates, beyond)


def test_sketches_are_not_private(counting):
    noisy = server.Admission(clip=1.0, noise_multiplier=1.0)
    with pytest.raises(InputError, match=r"fitness\.affinity=1.0: .* not private"):
        federate(counting, affinity=1.0).replace(admission=noisy)


def test_a_router_changes_nothing_that_clients_compute(counting):
    without, _ = play(federate(counting), counting, rounds=2)
    having, _ = play(federate(counting, with_router=True), counting, rounds=2)
    layer = "blocks_0/layer"
    shared = plain(having).server.shared
    router = shared["blocks_0"]["layer"].pop("router")
    del shared["blocks_0"]["layer"]
    chex.assert_trees_all_close(plain(without).server.shared, shared, atol=1e-5)
    chex.assert_trees_all_close(
        plain(without).server.experts[layer], plain(having).server.experts[layer], atol=1e-5
    )
    assert router["kernel"].shape == (EXPERTS, 16)


def test_the_assembled_model_goes_by_the_router(counting):
    federation = federate(counting, with_router=True)
    federation = federation.replace(ownership=models.Ownership(shared_gate=True))
    state, _ = play(federation, counting, rounds=1)
    whole = simulation.assembled_model(federation, state)
    layer = "blocks_0/layer"
    router = state.server.shared["blocks_0"]["layer"]["router"]
    np.testing.assert_array_equal(whole.params[f"{layer}/gate/kernel"], router["kernel"])
    np.testing.assert_array_equal(whole.params[f"{layer}/gate/bias"], router["bias"])


def test_router_loss_by_hand():
    # Two examples of a client that holds experts 2 and 0; the last slot is empty. The first went to
    # slot 0 (expert 2), the second to slot 1 (expert 0); a third is padding.
    selected = jnp.array([[True, False, False], [False, True, False], [True, False, False]])
    logits = jnp.log(jnp.array([[0.2, 0.3, 0.5], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]))
    routing = models.route(jnp.zeros((3, 3)), jnp.array([True, True, False]))
    routing = routing._replace(selected=selected, router=logits)
    loss = client.router_loss(routing, jnp.array([1.0, 1.0, 0.0]), jnp.array([2, 0, 3]))
    assert loss == pytest.approx(-(np.log(0.5) + np.log(0.8)) / 2, rel=1e-6)


def test_label_shares_are_needed_where_examples_have_labels(counting):
    federation = federate(counting, affinity=1.0)
    assert federation.fitness.beyond_labels
    assert not federation.needs_labels  # Tokens have none.
    assert not federate(counting).needs_labels
