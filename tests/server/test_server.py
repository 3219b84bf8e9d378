"""The server's state and steps, by hand: two layers, assigned together or each by itself.

Three clients, three experts, two slots.
"""

from __future__ import annotations

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

from flexmoe_jax.server import (
    Admission,
    Arrived,
    Desk,
    Due,
    FitnessOptions,
    Verdict,
    close,
    init,
    make_load_model,
    mean,
    send,
    without,
)
from flexmoe_jax.types import Feedback, Plan, Server

SHARED = {"w": np.array([1.0, 2.0], np.float32)}
EXPERTS = {
    "a": {"w": np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], np.float32)},
    "b": {"v": np.array([[10.0], [20.0], [30.0]], np.float32)},
}
CAPACITY = np.array([2, 2, 2])


def make_desk(optimizer=None, each=False, **choices) -> Desk:
    settings = {
        "admission": Admission(norm_factor=0.0),
        "fitness": FitnessOptions(beta=0.5, initial=0.5),
        "load": make_load_model("usage", np.full(3, 10), CAPACITY),
    }
    group = {"a": 0, "b": int(each)}
    return Desk(3, group, optimizer or optax.sgd(1.0), **(settings | choices))


def start(desk: Desk) -> Server:
    return jax.jit(lambda key: init(desk, key, SHARED, EXPERTS, clients=3))(jax.random.key(0))


def finish(desk: Desk, server: Server, plan: Plan, updates: Arrived, verdicts: Verdict) -> Server:
    """Closes a round with the plain mean."""
    total = mean().add(mean().zero(SHARED, EXPERTS, 2, 2), updates)
    due = Due(jnp.zeros(()), {}, jax.random.key(0))
    return close(desk, server, mean().mean(total, due), verdicts, plan)


DESKS = {each: make_desk(each=each) for each in (False, True)}


def play(server, slots, each=False, **answers) -> Server:
    """Clients 2 and 0 answer, or client 2 alone; answers are those of `close_with`."""
    numbers = {name: np.asarray(values, np.float32) for name, values in answers.items()}
    return jax.device_get(close_with(each, server, np.asarray(slots, np.int32), **numbers))


@partial(jax.jit, static_argnums=0)
def close_with(each, server, slots, shared, of_a, of_b, units, feedback) -> Server:
    """Closes a round with Δψ, Δθ and feedback.

    Args:
      each: whether each layer is assigned by itself.
      server: before.
      slots: (P, G, K).
      shared: (P, 2) Δψ.
      of_a: (P, K, 2) Δθ of layer a.
      of_b: (P, K, 1) Δθ of layer b.
      units: (P,).
      feedback: (usage, correct, loss), each (P, L, K).
    """
    desk, rows, feedback = DESKS[each], len(slots), Feedback(*feedback)
    of_layer = {layer: slots[:, group] for layer, group in desk.group.items()}
    usage = {layer: feedback.usage[:, i] for i, layer in enumerate(desk.group)}
    updates = Arrived({"w": shared}, {"a": {"w": of_a}, "b": {"v": of_b}}, of_layer, units, usage)
    there = units > 0
    lengths, sketch = jnp.ones((rows, 2)), jnp.zeros((rows, 0))
    verdicts = Verdict(there, ~there, lengths, feedback, units, units, units, sketch)
    load = desk.of_experts(slots, jnp.ones(slots.shape))
    ids = jnp.array([2, 0][:rows])
    plan = Plan(ids, slots, load, jnp.ones(rows, int), jnp.ones(rows))
    return finish(desk, server, plan, updates, verdicts)


# Client 2 holds experts 0 and 1, client 0 expert 0 alone; its second slot is empty.
SLOTS = [[[0, 1]], [[0, 3]]]
# By layer: of a, client 2 uses expert 0 alone. What stands for an empty slot must go nowhere.
FEEDBACK = (
    [[[6, 0], [2, 4]], [[2, 7], [2, 7]]],
    [[[3, 0], [1, 4]], [[2, 7], [2, 7]]],
    [[[6, 0], [2, 4]], [[1, 9], [3, 9]]],
)
UPDATES = {
    "shared": [[4.0, 0.0], [0.0, 8.0]],
    "of_a": [[[1.0, 0.0], [5.0, 5.0]], [[0.0, 2.0], [9.0, 9.0]]],
    "of_b": [[[4.0], [1.0]], [[8.0], [9.0]]],
    "units": [30, 10],
}


def test_weights_by_hand():
    new = play(start(DESKS[False]), SLOTS, **UPDATES, feedback=FEEDBACK)
    # ψ: (30·(4, 0) + 10·(0, 8)) / 40 = (3, 2), on top of (1, 2).
    assert new.shared["w"].tolist() == [4, 4]
    # θ_0 of a: (6·(1, 0) + 2·(0, 2)) / 8 = (0.75, 0.5), on top of (1, 1). θ_1 was held and not
    # used, θ_2 was not held: the 9s and 7 of the empty slot go nowhere.
    assert np.allclose(new.experts["a"]["w"][0], [1.75, 1.5])
    chex.assert_trees_all_equal(new.experts["a"]["w"][1:], EXPERTS["a"]["w"][1:])
    # θ_0 of b: (2·4 + 2·8) / 4 = 6; θ_1: one holder's update passes through.
    assert np.allclose(new.experts["b"]["v"], [[16], [21], [30]])
    assert new.round == 1


def test_books_by_hand_where_layers_are_assigned_together():
    ledger = play(start(DESKS[False]), SLOTS, **UPDATES, feedback=FEEDBACK).ledger
    # Means over the layers: client 2 gave experts 0 and 1 (6 + 2) / 2 and (0 + 4) / 2 units.
    assert ledger.usage.tolist() == [[[2, 0, 0], [0, 0, 0], [4, 2, 0]]]
    assert ledger.held_rounds.tolist() == [[[1, 0, 0], [0, 0, 0], [1, 1, 0]]]
    # Accuracies: 2 / 2; (3 + 1) / (6 + 2) and 4 / 4. Half of it, and half of 0.5.
    assert ledger.fitness.tolist() == [[[0.75, 0.5, 0.5], [0.5] * 3, [0.5, 0.75, 0.5]]]
    assert ledger.load.tolist() == [[2, 1, 0]]
    # Given was 6, 2, 0, and owed an even share of that: 8/3.
    assert np.allclose(ledger.deficit, [[8 / 3 - 6, 8 / 3 - 2, 8 / 3]])
    # Both experts changed in some layer; nobody has either as the server has it now.
    assert not ledger.current.any()


def test_books_by_hand_where_each_layer_is_assigned_by_itself():
    # In layer b client 2 holds experts 1 and 2, and client 0 expert 2.
    slots = [[[0, 1], [1, 2]], [[0, 3], [2, 3]]]
    new = play(start(DESKS[True]), slots, each=True, **UPDATES, feedback=FEEDBACK)
    ledger = new.ledger
    assert ledger.usage[0].tolist() == [[2, 0, 0], [0, 0, 0], [6, 0, 0]]
    assert ledger.usage[1].tolist() == [[0, 0, 2], [0, 0, 0], [0, 2, 4]]
    assert ledger.held_rounds[1].tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 1]]
    # In layer a of client 2: 3/6 for expert 0, and expert 1 was not used.
    assert ledger.fitness[0].tolist() == [[0.75, 0.5, 0.5], [0.5] * 3, [0.5, 0.5, 0.5]]
    assert ledger.fitness[1].tolist() == [[0.5, 0.5, 0.75], [0.5] * 3, [0.5, 0.5, 0.75]]
    assert ledger.load.tolist() == [[2, 1, 0], [0, 1, 2]]
    assert np.allclose(ledger.deficit[0], [8 / 3 - 8, 8 / 3, 8 / 3])
    assert np.allclose(ledger.deficit[1], [8 / 3, 8 / 3 - 2, 8 / 3 - 6])
    # Expert 1 of layer a has not changed, since nobody used it.
    assert ledger.current[0].tolist() == [[False] * 3, [False] * 3, [False, True, False]]
    assert not ledger.current[1].any()
    assert np.allclose(new.experts["b"]["v"], [[10], [24], [30 + (4 * 1 + 2 * 8) / 6]])


def test_what_a_client_has_it_has_until_it_changes_or_others_are_sent():
    nothing = {"shared": np.zeros((2, 2)), "of_a": np.zeros((2, 2, 2)), "units": [0, 0]}
    nothing |= {"of_b": np.zeros((2, 2, 1)), "feedback": np.zeros((3, 2, 2, 2))}
    server = play(start(DESKS[False]), SLOTS, **nothing)
    # Nobody delivered; both clients have what they were sent, and client 1 was not asked.
    assert server.ledger.current.tolist() == [
        [[True, False, False], [False] * 3, [True, True, False]]
    ]
    assert not server.ledger.held_rounds.any()
    # Client 0 is now sent another one, and what client 2 is sent changes.
    use = np.zeros((3, 2, 2, 2))
    use[0, 0, 0, 0] = 5
    server = play(server, [[[0, 2]], [[1, 3]]], **nothing | {"feedback": use})
    assert server.ledger.current.tolist() == [
        [[False, True, False], [False] * 3, [False, False, True]]
    ]


def test_one_holder_passes_its_update_through():
    updates = {"shared": [[0.0, 0.0]], "of_a": [[[0.25, -1.5], [0.0, 0.0]]], "units": [5]}
    updates |= {"of_b": np.zeros((1, 2, 1)), "feedback": [[[[5, 0], [5, 0]]]] * 3}
    new = play(start(DESKS[False]), [[[1, 3]]], **updates)
    expected = EXPERTS["a"]["w"][1] + np.array([0.25, -1.5], np.float32)
    chex.assert_trees_all_close(new.experts["a"]["w"][1], expected)


@jax.jit
def close_with_adam(slots, usage):
    return random_round(optax.adam(0.1), slots, usage)


@jax.jit
def close_with_momentum(slots, usage):
    return random_round(optax.sgd(1.0, momentum=0.9), slots, usage)


def random_round(optimizer, slots, usage) -> tuple[Server, Server]:
    desk = make_desk(optimizer)
    keys = jax.random.split(jax.random.key(0), 2)
    updates = Arrived(
        {"w": jnp.ones((4, 2))},
        {
            "a": {"w": jax.random.normal(keys[0], (4, 2, 2))},
            "b": {"v": jax.random.normal(keys[1], (4, 2, 1))},
        },
        {"a": slots, "b": slots},
        jnp.ones(4),
        {"a": usage, "b": usage},
    )
    both = jnp.stack([usage, usage], axis=1)
    ones = jnp.ones(4)
    lengths, sketch = jnp.ones((4, 2)), jnp.zeros((4, 0))
    said = Feedback(*[both] * 3)
    verdicts = Verdict(ones > 0, ones < 0, lengths, said, *[ones] * 3, sketch)
    plan = Plan(jnp.array([0, 1, 2, 3]), slots[:, None], jnp.zeros((1, 3)), ones, ones)
    server = start(desk)
    return server, finish(desk, server, plan, updates, verdicts)


@given(
    slots=hnp.arrays(np.int32, (4, 2), elements=st.integers(0, 3)),
    usage=hnp.arrays(np.int32, (4, 2), elements=st.integers(0, 50)),
    adam=st.booleans(),
)
def test_experts_that_nobody_used_are_bit_identical(slots, usage, adam):
    run = close_with_adam if adam else close_with_momentum
    old, new = run(slots, usage.astype(np.float32))
    used = [((slots == e) * usage).sum() > 0 for e in range(3)]
    for layer, stack in EXPERTS.items():
        for e in range(3):
            (before,), (after,) = (
                jax.tree.leaves(jax.tree.map(lambda x, e=e: x[e], s))
                for s in (stack, new.experts[layer])
            )
            assert bool((before == after).all()) != used[e]
            if not used[e]:
                chex.assert_trees_all_equal(
                    *(
                        jax.tree.map(lambda x, e=e: x[e], server.optimizer[1][layer])
                        for server in (old, new)
                    )
                )


def test_a_client_is_sent_its_experts_of_each_layer():
    server = start(make_desk(each=True))._replace(round=jnp.int32(7))
    slots = jnp.array([[1, 3], [0, 2]])
    down = send(make_desk(each=True), server, slots, jnp.int32(4))
    assert down.experts["a"]["w"][0].tolist() == [2, 2]
    assert down.experts["b"]["v"].tolist() == [[10], [30]]
    assert down.shared is server.shared
    assert (down.steps, down.round, down.slots) == (4, 7, slots)
    # Where layers are assigned together, the same of both.
    down = send(make_desk(), server, slots[:1], jnp.int32(4))
    assert down.experts["b"]["v"][0].tolist() == [20]


def test_nothing_is_known_of_lengths_that_nobody_judges():
    assert start(make_desk()).ledger.norms == ()
    judged = start(make_desk(admission=Admission()))
    assert judged.ledger.norms.shape[0] == 4
    assert not judged.ledger.norms.any()


def test_verdicts_without_some_are_as_if_those_had_been_refused():
    feedback = Feedback(*jnp.ones((3, 3, 1, 2)))
    there = jnp.array([True, True, False])
    sketch = jnp.ones((3, 4))
    verdicts = Verdict(there, ~there, jnp.ones((3, 2)), feedback, *jnp.ones((3, 3)), sketch)
    late = jnp.array([True, False, False])
    found = jax.device_get(without(late, verdicts))
    assert found.accepted.tolist() == [False, True, False]
    assert found.refused.tolist() == [True, False, True]
    assert found.units.tolist() == [0, 1, 1]
    assert found.feedback.usage[:, 0, 0].tolist() == [0, 1, 1]
    # How long it was is still known.
    assert found.lengths.tolist() == np.ones((3, 2)).tolist()


@pytest.mark.parametrize("each", [False, True])
def test_sums_by_expert_and_means_by_group(each):
    desk = make_desk(each=each)
    assert desk.groups == 1 + each
    slots = jnp.array([[[0, 1], [1, 3]], [[0, 3], [1, 2]]])[:, : desk.groups]
    amount = jnp.arange(1.0, 9.0).reshape(2, 2, 2)[:, : desk.groups]
    # In the first group, expert 0 gets 1 + 5 and expert 1 gets 2; in the second 3 + 7, and 8.
    assert desk.of_experts(slots, amount).tolist() == [[6, 2, 0], [0, 10, 8]][: desk.groups]
    of_layers = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])
    expected = [[[1, 2], [3, 6]]] if each else [[[2, 4]]]
    assert desk.by_group(of_layers).tolist() == expected


def test_a_model_without_experts_has_one_that_is_all_of_it():
    desk = make_desk()._replace(group={}, experts=1)
    assert desk.groups == 1
    assert desk.by_group(jnp.zeros((4, 0, 1))).tolist() == [[[0]]] * 4
