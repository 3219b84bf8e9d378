from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.server import Arrived, Due, Sums, geometric_median, mean, trimmed_mean

SHARED = {"w": jnp.zeros(2)}
# Two layers, with three experts each.
EXPERTS = {"a": {"w": jnp.zeros((3, 2))}, "b": {"v": jnp.zeros((3, 1))}}


def add_up(aggregator, updates: Arrived, shared, experts, blocks=()) -> Sums:
    """Returns the aggregate of the updates, added in blocks of these sizes."""
    rows, slots = next(iter(updates.slots.values())).shape

    @jax.jit
    def run(updates, shared, experts):
        total, first = aggregator.zero(shared, experts, rows, slots), 0
        for size in blocks or (rows,):
            block = jax.tree.map(lambda x, i=first, n=size: x[i : i + n], updates)
            total, first = aggregator.add(total, block), first + size
        return aggregator.mean(total, due_of(experts))

    return run(updates, shared, experts)


def due_of(experts, clients=0.0) -> Due:
    count = {layer: len(jax.tree.leaves(stack)[0]) for layer, stack in experts.items()}
    holders = {layer: jnp.zeros(e) for layer, e in count.items()}
    return Due(jnp.asarray(clients), holders, jax.random.key(0))


@pytest.fixture(scope="module")
def several() -> Arrived:
    """Updates of four clients to two layers, at random."""
    key = jax.random.split(jax.random.key(1), 3)
    slots = jnp.array([[0, 1], [1, 2], [2, 3], [0, 2]])
    usage = jnp.arange(8.0).reshape(4, 2)
    return Arrived(
        shared={"w": jax.random.normal(key[0], (4, 2))},
        experts={
            "a": {"w": jax.random.normal(key[1], (4, 2, 2))},
            "b": {"v": jax.random.normal(key[2], (4, 2, 1))},
        },
        slots={"a": slots, "b": slots[::-1]},
        weight=jnp.array([3.0, 1.0, 4.0, 1.0]),
        usage={"a": usage, "b": usage + 1},
    )


def test_sums_by_hand():
    # Two clients, two slots; the second client's second slot is empty (3 = E).
    updates = Arrived(
        shared={"w": jnp.array([[4.0, 0.0], [0.0, 8.0]])},
        experts={
            "a": {"w": jnp.array([[[1.0, 0.0], [5.0, 5.0]], [[0.0, 2.0], [9.0, 9.0]]])},
            "b": {"v": jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]])},
        },
        slots={"a": jnp.array([[0, 1], [0, 3]]), "b": jnp.array([[1, 2], [0, 2]])},
        weight=jnp.array([30.0, 10.0]),
        usage={"a": jnp.array([[6.0, 0.0], [2.0, 7.0]]), "b": jnp.array([[1.0, 2.0], [3.0, 4.0]])},
    )
    sums = add_up(mean(), updates, SHARED, EXPERTS)
    assert sums.shared["w"].tolist() == [30 * 4, 10 * 8]
    assert sums.shared_weight == 40
    # θ_0: 6·(1, 0) + 2·(0, 2). θ_1 was held and not used, θ_2 was not held: the 9s and 7 of the
    # empty slot go nowhere.
    assert sums.experts["a"]["w"].tolist() == [[6, 4], [0, 0], [0, 0]]
    assert sums.expert_weight["a"].tolist() == [8, 0, 0]
    # Layer b was assigned by itself: 3·3, 1·1, 2·2 + 4·4.
    assert sums.experts["b"]["v"].tolist() == [[9], [1], [20]]
    assert sums.expert_weight["b"].tolist() == [3, 1, 6]


AGGREGATORS = [mean(), trimmed_mean(0.3), geometric_median()]
NAMES = ["mean", "trimmed", "geometric"]


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=NAMES)
def test_blocks_add_up(several, aggregator):
    whole = add_up(aggregator, several, SHARED, EXPERTS)
    parts = add_up(aggregator, several, SHARED, EXPERTS, blocks=(1, 3))
    chex.assert_trees_all_close(parts, whole, rtol=1e-6)


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=NAMES)
def test_devices_add_up(several, aggregator):
    whole = add_up(aggregator, several, SHARED, EXPERTS)

    def on_one(share: Arrived) -> Sums:
        total = aggregator.add(aggregator.zero(SHARED, EXPERTS, 2, 2), share)
        return aggregator.mean(aggregator.merge(total, "devices"), due_of(EXPERTS))

    shares = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), several)
    both = jax.vmap(on_one, axis_name="devices")(shares)
    for device in range(2):
        found = jax.tree.map(lambda x, device=device: x[device], both)
        chex.assert_trees_all_close(found, whole, rtol=1e-6)


@pytest.mark.parametrize("aggregator", AGGREGATORS[1:], ids=NAMES[1:])
def test_of_collected_updates_any_can_be_left_out_late(several, aggregator):
    late = jnp.array([False, True, False, False])
    total = aggregator.add(aggregator.zero(SHARED, EXPERTS, 4, 2), several)
    left, out = aggregator.drop(total, late)
    assert out.tolist() == late.tolist()
    usage = {layer: jnp.where(late[:, None], 0, u) for layer, u in several.usage.items()}
    without = several._replace(weight=jnp.where(late, 0, several.weight), usage=usage)
    chex.assert_trees_all_close(
        aggregator.mean(left, due_of(EXPERTS)), add_up(aggregator, without, SHARED, EXPERTS)
    )


def test_of_a_sum_all_are_left_out_or_none(several):
    total = mean().add(mean().zero(SHARED, EXPERTS, 4, 2), several)
    kept, out = mean().drop(total, jnp.zeros(4, bool))
    chex.assert_trees_all_equal(kept, total)
    assert not out.any()
    left, out = mean().drop(total, jnp.array([False, True, False, False]))
    assert out.all()
    assert left.shared_weight == 0
    assert not any(weight.any() for weight in left.expert_weight.values())


def means(sums: Sums, expert=0) -> tuple[np.ndarray, np.ndarray]:
    weight = sums.expert_weight["a"][expert]
    return (
        np.asarray(sums.shared["w"] / jnp.maximum(sums.shared_weight, 1)),
        np.asarray(sums.experts["a"]["w"][expert] / jnp.maximum(weight, 1)),
    )


def test_trimmed_mean_and_median_by_hand():
    # Five clients; the last delivered nothing. Expert 0 has three users, expert 1 two, 2 none.
    updates = Arrived(
        shared={"w": jnp.array([[1.0], [2.0], [30.0], [4.0], [99.0]])},
        experts={
            "a": {
                "w": jnp.array(
                    [
                        [[5.0], [1.0]],
                        [[7.0], [3.0]],
                        [[-90.0], [8.0]],
                        [[6.0], [6.0]],
                        [[0.0], [0.0]],
                    ]
                )
            }
        },
        slots={"a": jnp.array([[0, 1], [0, 1], [0, 3], [2, 3], [0, 1]])},
        weight=jnp.array([10.0, 1.0, 1.0, 8.0, 0.0]),
        usage={"a": jnp.array([[4.0, 6.0], [1.0, 1.0], [1.0, 5.0], [0.0, 0.0], [0.0, 0.0]])},
    )
    like = {"w": jnp.zeros(1)}, {"a": {"w": jnp.zeros((3, 1))}}
    quarter = add_up(trimmed_mean(0.25), updates, *like)
    # ψ: 1, 2, 4, 30 without the least and the greatest: 3. Weight: all examples.
    # θ_0: ⌈0.25 · 3⌉ = 1 left out at either end: 5. θ_1: of two none can be: (1 + 3) / 2 = 2.
    assert np.allclose(means(quarter), [[3], [5]])
    assert np.allclose(means(quarter, 1)[1], 2)
    assert quarter.shared_weight == 20
    assert quarter.expert_weight["a"].tolist() == [6, 7, 0]
    assert quarter.experts["a"]["w"][2] == 0
    median = add_up(trimmed_mean(0.5), updates, *like)
    assert np.allclose(means(median), [[3], [5]])  # of 2 and 4; of -90, 5 and 7
    assert np.allclose(means(median, 1)[1], 2)


def one_expert(values, weight) -> tuple:
    """The same values (P, D) and weights (P,) for ψ and for an expert that everybody holds."""
    values, weight = jnp.asarray(values, jnp.float32), jnp.asarray(weight, jnp.float32)
    updates = Arrived(
        {"w": values},
        {"a": {"w": values[:, None]}},
        {"a": jnp.zeros((len(values), 1), jnp.int32)},
        weight,
        {"a": weight[:, None]},
    )
    nothing = jnp.zeros(values.shape[1])
    return updates, {"w": nothing}, {"a": {"w": nothing[None]}}


@jax.jit
def compiled_trimmed_mean(trim, *parts) -> Sums:
    return add_up(trimmed_mean(trim), *parts)


@jax.jit
def compiled_geometric_median(*parts) -> Sums:
    return add_up(geometric_median(), *parts)


@given(
    st.integers(0, 2**9 - 1), st.integers(0, 2**32 - 1), st.sampled_from([0, 1e-9, 0.1, 0.3, 0.5])
)
def test_trimmed_mean_is_numpys(delivered, seed, trim):
    there = np.array([delivered >> c & 1 for c in range(9)], bool)
    values = np.random.default_rng(seed).normal(size=(9, 3)).astype(np.float32)
    found = compiled_trimmed_mean(trim, *one_expert(values, there))
    count = int(there.sum())
    cut = min(math.ceil(trim * count - 1e-12), max(count - 1, 0) // 2)
    # Whatever is to be trimmed is, as soon as there are three.
    assert cut > 0 or trim == 0 or count < 3
    kept = np.sort(values[there], axis=0)[cut : count - cut]
    expected = kept.mean(axis=0) if count else np.zeros(3)
    for average in means(found):
        assert np.allclose(average, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("trim", "count", "cut"),
    [(0.1, 10, 1), (0.1, 20, 2), (0.1, 11, 2), (0.15, 20, 3), (0.3, 10, 3)],
)
def test_whole_numbers_of_updates_are_trimmed_as_they_are(trim, count, cut):
    # 0.1 · 10 is 1, whatever it is in single precision.
    values = np.arange(count)[:, None] ** 2.0
    expected = values[cut : count - cut].mean()
    for average in means(compiled_trimmed_mean(trim, *one_expert(values, np.ones(count)))):
        assert average == pytest.approx(expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_robust_means_leave_out_what_is_not_a_number(bad):
    values = np.array([[1.0, 2.0], [3.0, bad], [1.0, 2.0], [1.0, 2.0]])
    for aggregator in (trimmed_mean(0.0), trimmed_mean(0.5), geometric_median()):
        sums = add_up(aggregator, *one_expert(values, np.ones(4)))
        assert sums.shared_weight == sums.expert_weight["a"][0] == 3
        for middle in means(sums):
            assert np.allclose(middle, [1, 2])


def test_geometric_median_by_hand():
    def find(values, weight, steps=8) -> tuple[np.ndarray, np.ndarray]:
        return means(add_up(geometric_median(steps), *one_expert(values, weight)))

    # Of three corners of an equilateral triangle it is the centre, wherever the triangle lies.
    corners = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, np.sqrt(3)]])
    for offset in (0.0, 30.0):
        for middle in find(corners + offset, np.ones(3), steps=50):
            assert np.allclose(middle, offset + corners.mean(axis=0), atol=0.02)
    # One alone is taken as it is; of two, one far away hardly counts.
    assert np.allclose(find([[7.0, 0.0], [9.0, 9.0]], [5.0, 0.0])[0], [7, 0])
    for middle in find([[1.0, 0.0], [0.0, 1e6]], np.ones(2)):
        assert np.linalg.norm(middle) < 3
    # Weights count as so many updates of weight 1, and clients without a weight as none.
    values = np.random.default_rng(0).normal(size=(4, 3))
    weight = np.array([3, 1, 0, 2])
    repeated = np.repeat(values, weight, axis=0)
    for one, other in zip(find(values, weight), find(repeated, np.ones(weight.sum())), strict=True):
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
        return means(compiled_geometric_median(*one_expert(rows, np.ones(9))))[0]

    middle = find(values)
    # Of 9 up to 4 are faulty, all of them on one side at worst.
    assert np.linalg.norm(middle - [1, 0, 0]) < 2.5
    assert np.allclose(find(values[list(order)]), middle, atol=1e-4)
    scaled = find(values * np.float32(scale))
    assert np.allclose(scaled, scale * middle, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("aggregator", [*AGGREGATORS[1:], mean()], ids=[*NAMES[1:], NAMES[0]])
def test_parts_that_clients_keep_to_themselves_have_no_middle(several, aggregator):
    nobodys = several._replace(shared={}, experts={}, slots={}, usage={})
    total = aggregator.add(aggregator.zero({}, {}, 4, 2), nobodys)
    none = aggregator.mean(total, due_of(EXPERTS))
    assert (none.shared, none.experts, none.expert_weight) == ({}, {}, {})
    assert none.shared_weight == 9


@pytest.mark.parametrize("which", range(len(AGGREGATORS)))
def test_means_are_the_same_in_double_precision_mode(several, which):
    single = add_up(AGGREGATORS[which], several, SHARED, EXPERTS)
    with jax.enable_x64():
        double = add_up(AGGREGATORS[which], several, SHARED, EXPERTS)
    chex.assert_trees_all_equal_dtypes(single, double)
    chex.assert_trees_all_close(single, double, atol=1e-5)
