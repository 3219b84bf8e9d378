from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexmoe_jax.federated import (
    Updates,
    add_updates,
    apply_sums,
    init_server,
    init_sums,
    trimmed_mean,
)

SHARED = {"w": jnp.array([1.0, 2.0])}
EXPERTS = {"w": jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])}


def aggregate(shared, experts, slots, examples, usage, server=None):
    server = server or optax.sgd(1.0)
    sums = add_updates(
        init_sums(SHARED, EXPERTS, 3),
        {"w": jnp.asarray(shared)},
        {"w": jnp.asarray(experts)},
        jnp.asarray(slots),
        jnp.asarray(examples, jnp.float32),
        jnp.asarray(usage, jnp.float32),
    )
    return apply_sums(server, sums, SHARED, EXPERTS, *init_server(server, SHARED, EXPERTS))


def test_weights_by_hand():
    # Two clients, two slots; the second client's second slot is empty (3 = E).
    new = aggregate(
        shared=[[4.0, 0.0], [0.0, 8.0]],
        experts=[[[1.0, 0.0], [5.0, 5.0]], [[0.0, 2.0], [9.0, 9.0]]],
        slots=[[0, 1], [0, 3]],
        examples=[30, 10],
        usage=[[6, 0], [2, 7]],
    )
    # ψ: (30·(4, 0) + 10·(0, 8)) / 40 = (3, 2), on top of (1, 2).
    chex.assert_trees_all_close(new.shared["w"], jnp.array([4.0, 4.0]))
    # θ_0: (6·(1, 0) + 2·(0, 2)) / 8 = (0.75, 0.5), on top of (1, 1).
    chex.assert_trees_all_close(new.experts["w"][0], jnp.array([1.75, 1.5]))
    # θ_1 was held and not used, θ_2 was not held: the 9s and 7 of the empty slot go nowhere.
    chex.assert_trees_all_equal(new.experts["w"][1:], EXPERTS["w"][1:])


def test_one_holder_passes_its_update_through():
    update = jnp.array([[[0.25, -1.5]]])
    new = aggregate([[0.0, 0.0]], update, [[1]], [5], [[5]])
    chex.assert_trees_all_close(new.experts["w"][1], EXPERTS["w"][1] + update[0, 0])


@given(
    slots=hnp.arrays(np.int32, (4, 2), elements=st.integers(0, 3)),
    usage=hnp.arrays(np.int32, (4, 2), elements=st.integers(0, 50)),
    adam=st.booleans(),
)
def test_experts_that_nobody_used_are_bit_identical(slots, usage, adam):
    updates = jax.random.normal(jax.random.key(0), (4, 2, 2))
    server = optax.adam(0.1) if adam else optax.sgd(1.0, momentum=0.9)
    new = aggregate(jnp.ones((4, 2)), updates, slots, np.ones(4), usage, server)
    used = [((slots == e) * usage).sum() > 0 for e in range(3)]
    old_state = init_server(server, SHARED, EXPERTS)[1]
    for e in range(3):
        same = bool((new.experts["w"][e] == EXPERTS["w"][e]).all())
        assert same != used[e]
        if not used[e]:
            chex.assert_trees_all_equal(
                jax.tree.map(lambda leaf, e=e: leaf[e], new.expert_optimizer),
                jax.tree.map(lambda leaf, e=e: leaf[e], old_state),
            )


def test_blocks_add_up():
    key = jax.random.split(jax.random.key(1), 2)
    shared = {"w": jax.random.normal(key[0], (4, 2))}
    experts = {"w": jax.random.normal(key[1], (4, 2, 2))}
    slots = jnp.array([[0, 1], [1, 2], [2, 3], [0, 2]])
    examples, usage = jnp.array([3.0, 1.0, 4.0, 1.0]), jnp.arange(8.0).reshape(4, 2)
    whole = add_updates(init_sums(SHARED, EXPERTS, 3), shared, experts, slots, examples, usage)
    parts = init_sums(SHARED, EXPERTS, 3)
    for rows in (slice(0, 1), slice(1, 4)):
        block = jax.tree.map(
            lambda x, rows=rows: x[rows], (shared, experts, slots, examples, usage)
        )
        parts = add_updates(parts, *block)
    chex.assert_trees_all_close(parts, whole, rtol=1e-6)


def test_trimmed_mean_and_median_by_hand():
    # Five clients; the last delivered nothing. Expert 0 has three users, expert 1 two, 2 none.
    updates = Updates(
        shared={"w": jnp.array([[1.0], [2.0], [30.0], [4.0], [99.0]])},
        experts={
            "w": jnp.array(
                [[[5.0], [1.0]], [[7.0], [3.0]], [[-90.0], [8.0]], [[6.0], [6.0]], [[0.0], [0.0]]]
            )
        },
        slots=jnp.array([[0, 1], [0, 1], [0, 3], [2, 3], [0, 1]]),
        examples=jnp.array([10.0, 1.0, 1.0, 8.0, 0.0]),
        usage=jnp.array([[4.0, 6.0], [1.0, 1.0], [1.0, 5.0], [0.0, 0.0], [0.0, 0.0]]),
    )
    quarter = trimmed_mean(updates, 3, 0.25)
    # ψ: 1, 2, 4, 30 without the least and the greatest: 3. Weight: all examples.
    assert quarter.shared["w"] / quarter.shared_weight == pytest.approx(3.0)
    assert quarter.shared_weight == 20
    # θ_0: ⌊0.25 · 3⌋ = 0 left out: (5 + 7 - 90) / 3 = -26. θ_1: (1 + 3) / 2 = 2.
    assert np.allclose(quarter.experts["w"][:2, 0] / quarter.expert_weight[:2], [-26.0, 2.0])
    assert quarter.expert_weight.tolist() == [6, 7, 0]
    assert quarter.experts["w"][2] == 0
    median = trimmed_mean(updates, 3, 0.5)
    assert median.shared["w"] / median.shared_weight == pytest.approx(3.0)  # of 2 and 4
    assert np.allclose(median.experts["w"][:2, 0] / median.expert_weight[:2], [5.0, 2.0])


compiled_trimmed_mean = jax.jit(trimmed_mean, static_argnums=1)


@given(st.integers(0, 2**9 - 1), st.integers(0, 2**32 - 1), st.floats(0, 0.5))
def test_trimmed_mean_is_numpys(delivered, seed, trim):
    there = np.array([delivered >> c & 1 for c in range(9)], bool)
    values = np.random.default_rng(seed).normal(size=(9, 3)).astype(np.float32)
    found = compiled_trimmed_mean(
        Updates(
            {"w": jnp.asarray(values)},
            {"w": jnp.asarray(values)[:, None]},
            jnp.zeros((9, 1), int),
            jnp.asarray(there, jnp.float32),
            jnp.asarray(there[:, None], jnp.float32),
        ),
        1,
        trim,
    )
    count = int(there.sum())
    cut = min(int(np.float32(trim) * np.float32(count)), max(count - 1, 0) // 2)
    kept = np.sort(values[there], axis=0)[cut : count - cut]
    expected = kept.mean(axis=0) if count else np.zeros(3)
    assert np.allclose(found.shared["w"] / max(count, 1), expected, atol=1e-5)
    assert np.allclose(found.experts["w"][0] / max(count, 1), expected, atol=1e-5)
