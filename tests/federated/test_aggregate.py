from __future__ import annotations

import math
from functools import partial

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
    geometric_median,
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
    # θ_0: ⌈0.25 · 3⌉ = 1 left out at either end: 5. θ_1: of two none can be: (1 + 3) / 2 = 2.
    assert np.allclose(quarter.experts["w"][:2, 0] / quarter.expert_weight[:2], [5.0, 2.0])
    assert quarter.expert_weight.tolist() == [6, 7, 0]
    assert quarter.experts["w"][2] == 0
    median = trimmed_mean(updates, 3, 0.5)
    assert median.shared["w"] / median.shared_weight == pytest.approx(3.0)  # of 2 and 4
    assert np.allclose(median.experts["w"][:2, 0] / median.expert_weight[:2], [5.0, 2.0])


compiled_trimmed_mean = jax.jit(trimmed_mean, static_argnums=1)
compiled_geometric_median = jax.jit(geometric_median, static_argnums=1)


def one_expert(values: np.ndarray, weight: np.ndarray) -> Updates:
    """The same values (P, D) and weights (P,) for ψ and for an expert that everybody holds."""
    return Updates(
        {"w": jnp.asarray(values, jnp.float32)},
        {"w": jnp.asarray(values, jnp.float32)[:, None]},
        jnp.zeros((len(values), 1), int),
        jnp.asarray(weight, jnp.float32),
        jnp.asarray(weight, jnp.float32)[:, None],
    )


def means(sums) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.asarray(sums.shared["w"] / jnp.maximum(sums.shared_weight, 1)),
        np.asarray(sums.experts["w"][0] / jnp.maximum(sums.expert_weight[0], 1)),
    )


@given(
    st.integers(0, 2**9 - 1), st.integers(0, 2**32 - 1), st.sampled_from([0, 1e-9, 0.1, 0.3, 0.5])
)
def test_trimmed_mean_is_numpys(delivered, seed, trim):
    there = np.array([delivered >> c & 1 for c in range(9)], bool)
    values = np.random.default_rng(seed).normal(size=(9, 3)).astype(np.float32)
    found = compiled_trimmed_mean(one_expert(values, there), 1, trim)
    count = int(there.sum())
    cut = min(math.ceil(trim * count - 1e-12), max(count - 1, 0) // 2)
    # Whatever is to be trimmed is, as soon as there are three.
    assert cut > 0 or trim == 0 or count < 3
    kept = np.sort(values[there], axis=0)[cut : count - cut]
    expected = kept.mean(axis=0) if count else np.zeros(3)
    for mean in means(found):
        assert np.allclose(mean, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("trim", "count", "cut"),
    [(0.1, 10, 1), (0.1, 20, 2), (0.1, 11, 2), (0.15, 20, 3), (0.3, 10, 3)],
)
def test_whole_numbers_of_updates_are_trimmed_as_they_are(trim, count, cut):
    # 0.1 · 10 is 1, whatever it is in single precision.
    values = np.arange(count)[:, None] ** 2.0
    expected = values[cut : count - cut].mean()
    for mean in means(compiled_trimmed_mean(one_expert(values, np.ones(count)), 1, trim)):
        assert mean == pytest.approx(expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_robust_means_leave_out_what_is_not_a_number(bad):
    values = np.array([[1.0, 2.0], [3.0, bad], [1.0, 2.0], [1.0, 2.0]])
    for aggregator in (
        lambda updates: trimmed_mean(updates, 1, 0.0),
        lambda updates: trimmed_mean(updates, 1, 0.5),
        lambda updates: geometric_median(updates, 1),
    ):
        sums = aggregator(one_expert(values, np.ones(4)))
        assert sums.shared_weight == sums.expert_weight[0] == 3
        for mean in means(sums):
            assert np.allclose(mean, [1, 2])


def test_geometric_median_by_hand():
    # Of three corners of an equilateral triangle it is the centre, wherever the triangle lies.
    corners = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, np.sqrt(3)]])
    for offset in (0.0, 30.0):
        updates = one_expert(corners + offset, np.ones(3))
        for middle in means(geometric_median(updates, 1, steps=50)):
            assert np.allclose(middle, offset + corners.mean(axis=0), atol=0.02)
    # One alone is taken as it is; of two, one far away hardly counts.
    alone = one_expert([[7.0, 0.0], [9.0, 9.0]], np.array([5.0, 0.0]))
    assert np.allclose(means(geometric_median(alone, 1))[0], [7, 0])
    for middle in means(geometric_median(one_expert([[1.0, 0.0], [0.0, 1e6]], np.ones(2)), 1)):
        assert np.linalg.norm(middle) < 3
    # Weights count as so many updates of weight 1, and clients without a weight as none.
    values = np.random.default_rng(0).normal(size=(4, 3))
    weight = np.array([3, 1, 0, 2])
    repeated = one_expert(np.repeat(values, weight, axis=0), np.ones(weight.sum()))
    for one, other in zip(
        means(geometric_median(one_expert(values, weight), 1)),
        means(geometric_median(repeated, 1)),
        strict=True,
    ):
        assert np.allclose(one, other, atol=0.02)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.floats(1, 1e12),
    st.floats(1e-3, 1e3),
    st.permutations(range(9)),
)
def test_a_geometric_median_stays_with_the_honest_and_scales_with_them(
    seed, faulty, length, scale, order
):
    rng = np.random.default_rng(seed)
    values = np.array([1.0, 0, 0]) + 0.1 * rng.normal(size=(9, 3))
    values[:faulty] = length * rng.normal(size=(faulty, 3))
    values = values.astype(np.float32)

    def find(rows: np.ndarray) -> np.ndarray:
        return means(compiled_geometric_median(one_expert(rows, np.ones(9)), 1))[0]

    middle = find(values)
    # Of 9 up to 4 are faulty, all of them on one side at worst.
    assert np.linalg.norm(middle - [1, 0, 0]) < 2.5
    assert np.allclose(find(values[list(order)]), middle, atol=1e-4)
    scaled = find(values * np.float32(scale))
    assert np.allclose(scaled, scale * middle, rtol=1e-3, atol=1e-3 * scale)


def test_parts_that_clients_keep_to_themselves_have_no_middle():
    updates = one_expert(np.ones((3, 2)), np.ones(3))
    for aggregator in (geometric_median, partial(trimmed_mean, trim=0.5)):
        none = aggregator(updates._replace(shared={}, experts={}), 1)
        assert (none.shared, none.experts) == ({}, {})
        assert none.shared_weight == none.expert_weight[0] == 3
