from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax import models
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.client import Codec, make_compressor
from flexmoe_jax.simulation import (
    Arrival,
    Payload,
    payload,
    payloads,
    sample_cohort,
    traffic,
    tree_bytes,
)
from tests.conftest import CAPACITY
from tests.simulation.conftest import DEEP, EXPERTS

# ψ: MLP 64·16 + 16, head 16·10 + 10; an expert: 16·8 + 8 + 8·16 + 16. Four bytes each.
SHARED, EXPERT = 4 * (64 * 16 + 16 + 16 * 10 + 10), 4 * (16 * 8 + 8 + 8 * 16 + 16)


@pytest.fixture(scope="module")
def state(simulated):
    return simulated.init(jax.random.key(0))


def averaged(state):
    return state.server.shared, state.server.experts


def test_bytes_by_hand(state):
    assignment = np.array([[True, False, False, True], [False, True, False, False]])
    current = np.array([[True, True, False, False], [False, False, False, True]])
    sizes = payload(*averaged(state))
    found = traffic(assignment, sizes, current)
    # The first client has expert 0 already; expert 1, which it has too, it is not to hold.
    assert found.down.tolist() == [SHARED + EXPERT, SHARED + EXPERT]
    assert found.cached.tolist() == [EXPERT, 0]
    assert found.up.tolist() == [SHARED + 2 * (EXPERT + 12), SHARED + EXPERT + 12]
    assert traffic(assignment, sizes).down.tolist() == [SHARED + 2 * EXPERT, SHARED + EXPERT]


def test_compression_halves_uploads_alone(state):
    plain = payload(*averaged(state))
    halved = payload(*averaged(state), Codec(make_compressor("bfloat16")))
    assert halved.shared_up == plain.shared_up // 2
    assert halved.expert_up - 12 == (plain.expert_up - 12) // 2
    assert halved[:2] == plain[:2]


def test_bytes_of_groups_add_up_by_hand():
    first, second = Payload(100, 10, 50, 5), Payload(100, 1, 50, 2)
    assignment = np.array([[[True, True, False], [False, True, True]], [[True, False, False]] * 2])
    current = np.array([[[True, False, False], [False] * 3], [[False] * 3, [True, True, True]]])
    found = traffic(assignment, (first, second), current)
    # ψ once; of the first group client 0 has one of two, of the second client 1 its only one.
    assert found.down.tolist() == [100 + 10 + 2 * 1, 100 + 10]
    assert found.cached.tolist() == [10, 1]
    assert found.up.tolist() == [50 + 2 * 5 + 2 * 2, 50 + 5 + 2]


def test_bytes_of_a_federation_with_two_layers(make_simulation):
    # Experts of the second layer are half as large: 16·4 + 4 + 4·16 + 16.
    small = 4 * (16 * 4 + 4 + 4 * 16 + 16)
    both = (SHARED, EXPERT + small, SHARED, EXPERT + small + 2 * 12)
    same, each = (make_simulation(model=DEEP, layers=name) for name in ("same", "each"))
    assert payloads(same.setting.federation) == (both,)
    assert payloads(each.setting.federation) == (
        (SHARED, EXPERT, SHARED, EXPERT + 12),
        (SHARED, small, SHARED, small + 12),
    )


def test_experts_that_stay_with_their_clients_are_told_of_alone(make_simulation):
    own = make_simulation(
        ownership=models.Ownership(("expert",)),
        capacity=np.full_like(CAPACITY, EXPERTS),
        policy=make_policy("full"),
    )
    assert payloads(own.setting.federation) == ((SHARED, 0, SHARED, 12),)


@pytest.mark.parametrize("name", ["flex", "greedy", "full"])
def test_bytes_are_those_of_the_leaves_that_travel(make_simulation, state, name):
    capacity = np.full_like(CAPACITY, EXPERTS) if name == "full" else CAPACITY
    simulated = make_simulation(policy=make_policy(name), capacity=capacity)
    cohort = np.arange(len(CAPACITY), dtype=np.int32)
    (solution,) = simulated.assign(state, cohort)
    found = traffic(solution.assignment, payload(*averaged(state)))
    for client, held in enumerate(solution.assignment):
        shared, experts = averaged(state)
        sent = shared, jax.tree.map(lambda x, held=held: x[held], experts)
        assert found.down[client] == sum(np.asarray(x).nbytes for x in jax.tree.leaves(sent))
        assert found.up[client] == found.down[client] + 3 * 4 * held.sum()
    assert found.down.sum() == len(cohort) * SHARED + capacity.sum() * EXPERT
    assert tree_bytes(state.server.shared) == SHARED


def test_what_a_client_still_has(simulated, clients):
    """A copy is current if it was received last and no update has changed it since."""
    state = simulated.init(jax.random.key(0))
    assert not state.server.ledger.current.any()
    received = {}
    for t in range(6):
        cohort = sample_cohort(len(CAPACITY), 2, seed=1, round_index=t)
        (solution,) = simulated.assign(state, cohort)
        before = jax.device_get(state.server.experts)
        arrival = Arrival(
            work=np.array([1.0, 0.0]), reached=np.array([True, t % 2 == 0]), tamper=np.ones(2)
        )
        plan = simulated.plan(cohort, (solution,), arrival)
        state, _ = simulated.round(state, clients, plan)
        after = jax.device_get(state.server.experts)
        changed = [
            any(
                (a[e] != b[e]).any()
                for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True)
            )
            for e in range(EXPERTS)
        ]
        for client, held in zip(
            cohort[arrival.reached], solution.assignment[arrival.reached], strict=True
        ):
            received[int(client)] = {e for e in range(EXPERTS) if held[e]}
        for experts in received.values():
            experts -= {e for e in range(EXPERTS) if changed[e]}
        expected = np.zeros((len(CAPACITY), EXPERTS), bool)
        for client, experts in received.items():
            expected[client, list(experts)] = True
        assert np.array_equal(state.server.ledger.current, [expected])
    assert expected.any()  # a client that delivered nothing, with an expert that no other used


def test_a_price_on_movement_keeps_experts_where_they_are(make_simulation, simulated):
    state = simulated.init(jax.random.key(0))
    held = np.zeros((len(CAPACITY), EXPERTS), bool)
    held[:, 0] = True  # one expert that all have already; the load bounds would spread it
    ledger = state.server.ledger._replace(current=jnp.asarray(held)[None])
    state = state._replace(server=state.server._replace(ledger=ledger))
    sent = {}
    for price in (0.0, 10.0):
        policy = make_policy("flex", slack=9.0, movement=price)
        cohort = np.arange(len(CAPACITY), dtype=np.int32)
        (solution,) = make_simulation(policy=policy).assign(state, cohort)
        sent[price] = traffic(solution.assignment, payload(*averaged(state)), held).down.sum()
    assert sent[10.0] == len(CAPACITY) * SHARED + (CAPACITY.sum() - len(CAPACITY)) * EXPERT
    assert sent[0.0] > sent[10.0]
