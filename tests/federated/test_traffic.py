from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flexmoe_jax.federated import (
    Arrival,
    make_compressor,
    payload,
    sample_cohort,
    traffic,
    tree_bytes,
)

from flexmoe_jax.assignment import make_policy
from tests.federated.conftest import CAPACITY, EXPERTS

# ψ: MLP 64·16 + 16, head 16·10 + 10; an expert: 16·8 + 8 + 8·16 + 16. Four bytes each.
SHARED, EXPERT = 4 * (64 * 16 + 16 + 16 * 10 + 10), 4 * (16 * 8 + 8 + 8 * 16 + 16)


@pytest.fixture(scope="module")
def state(make_algorithm):
    return make_algorithm().init(jax.random.key(0))


def test_bytes_by_hand(state):
    assignment = np.array([[True, False, False, True], [False, True, False, False]])
    fresh = np.array([[True, True, False, False], [False, False, False, True]])
    sizes = payload(state.shared, state.experts)
    found = traffic(assignment, sizes, fresh)
    # The first client has expert 0 already; expert 1, which it has too, it is not to hold.
    assert found.down.tolist() == [SHARED + EXPERT, SHARED + EXPERT]
    assert found.cached.tolist() == [EXPERT, 0]
    assert found.up.tolist() == [SHARED + 2 * (EXPERT + 12), SHARED + EXPERT + 12]
    assert traffic(assignment, sizes).down.tolist() == [SHARED + 2 * EXPERT, SHARED + EXPERT]


def test_compression_halves_uploads_alone(state):
    plain = payload(state.shared, state.experts)
    halved = payload(state.shared, state.experts, make_compressor("bfloat16"))
    assert halved.shared_up == plain.shared_up // 2
    assert halved.expert_up - 12 == (plain.expert_up - 12) // 2
    assert halved[:2] == plain[:2]


@pytest.mark.parametrize("name", ["flex", "greedy", "full"])
def test_bytes_are_those_of_the_leaves_that_travel(make_algorithm, clients, state, name):
    capacity = np.full_like(CAPACITY, EXPERTS) if name == "full" else CAPACITY
    algorithm = make_algorithm(policy=make_policy(name), capacity=capacity)
    cohort = np.arange(len(CAPACITY), dtype=np.int32)
    assignment = algorithm.assign(state, cohort).assignment
    found = traffic(assignment, payload(state.shared, state.experts))
    for client, held in enumerate(assignment):
        sent = state.shared, jax.tree.map(lambda x, held=held: x[held], state.experts)
        assert found.down[client] == sum(np.asarray(x).nbytes for x in jax.tree.leaves(sent))
        assert found.up[client] == found.down[client] + 3 * 4 * held.sum()
    assert found.down.sum() == len(cohort) * SHARED + capacity.sum() * EXPERT
    assert tree_bytes(state.shared) == SHARED


def test_what_a_client_still_has(make_algorithm, clients):
    """Fresh is what was received last and has not been changed by anybody since."""
    algorithm = make_algorithm()
    state = algorithm.init(jax.random.key(0))
    assert not state.fresh.any()
    received = {}
    for t in range(6):
        cohort = sample_cohort(len(CAPACITY), 2, seed=1, round_index=t)
        solution = algorithm.assign(state, cohort)
        before = jax.device_get(state.experts)
        arrival = Arrival(
            work=np.array([1.0, 0.0]), reached=np.array([True, t % 2 == 0]), tamper=np.ones(2)
        )
        state, _ = algorithm.round(state, clients, algorithm.plan(cohort, solution, arrival))
        after = jax.device_get(state.experts)
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
        assert np.array_equal(state.fresh, expected)
    assert expected.any()  # a client that delivered nothing, of an expert that nobody else used


def test_a_price_on_movement_keeps_experts_where_they_are(make_algorithm):
    state = make_algorithm().init(jax.random.key(0))
    held = np.zeros((len(CAPACITY), EXPERTS), bool)
    held[:, 0] = True  # one expert that all have already; the load bounds would spread it
    state = state._replace(fresh=jnp.asarray(held))
    sent = {}
    for price in (0.0, 10.0):
        policy = make_policy("flex", slack=9.0, movement=price)
        algorithm = make_algorithm(policy=policy)
        cohort = np.arange(len(CAPACITY), dtype=np.int32)
        assignment = algorithm.assign(state, cohort).assignment
        sent[price] = traffic(assignment, payload(state.shared, state.experts), held).down.sum()
    assert sent[10.0] == len(CAPACITY) * SHARED + (CAPACITY.sum() - len(CAPACITY)) * EXPERT
    assert sent[0.0] > sent[10.0]
