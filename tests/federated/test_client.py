from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flexmoe_jax.federated import LocalTraining, draw_batches, make_client, proximal
from flexmoe_jax.federated.client import largest_array
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.data import flip
from flexmoe_jax.models import MLP, MoEClassifier, merge_params, split_params
from flexmoe_jax.types import Params

MODEL = MoEClassifier(MLP((6,)), classes=10, experts=2, hidden=4)


def apply(params, images, held):
    images = images.astype(jnp.float32) / 255
    return MODEL.apply({"params": merge_params(params)}, images, held)


@pytest.fixture(scope="module")
def start():
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.ones(2, bool))
    return split_params(params["params"])


def train(client, start, local, index, size, held, key=0):
    @jax.jit
    def run(start, index, size, held, key):
        state = client.init(start)
        batches = draw_batches(local, key, index, size)
        steps = local.steps(size)
        state = jax.lax.fori_loop(
            0,
            steps,
            lambda t, s: client.step(s, jax.tree.map(lambda x: x[t], batches), held),
            state,
        )
        return client.final(start, state)

    size = jnp.asarray(size, jnp.int32)
    return run(start, jnp.asarray(index), size, jnp.asarray(held), jax.random.key(key))


@given(st.integers(1, 500), st.integers(1, 7), st.integers(1, 64), st.integers(0, 20))
def test_steps_cover_every_epoch(size, epochs, batch, cap):
    local = LocalTraining(optax.sgd(0.1), epochs, batch, max_steps=cap)
    steps = int(local.steps(jnp.asarray(size)))
    whole = epochs * int(np.ceil(size / batch))
    assert steps == (min(whole, cap) if cap else whole)


@pytest.mark.parametrize(
    ("size", "padding", "epochs", "batch_size"), [(1, 0, 1, 1), (7, 5, 3, 4), (12, 3, 2, 6)]
)
def test_batches_hold_every_example_once_an_epoch(size, padding, epochs, batch_size):
    local = LocalTraining(optax.sgd(0.1), epochs, batch_size)
    rows = np.arange(100, 100 + size + padding)
    batches = np.asarray(draw_batches(local, jax.random.key(0), jnp.asarray(rows), size).rows)
    assert batches.shape == (local.steps(np.asarray(size + padding)), batch_size)
    steps, per_epoch = int(local.steps(np.asarray(size))), -(-size // batch_size)
    for epoch in np.split(batches[:steps], epochs):
        assert len(epoch) == per_epoch
        assert sorted(epoch[epoch >= 0]) == list(rows[:size])
    assert (batches[steps:] == -1).all()
    # Another client's size, which decides the padding, changes nothing.
    alone = np.asarray(draw_batches(local, jax.random.key(0), jnp.asarray(rows[:size]), size).rows)
    assert (batches[:steps] == alone).all()


@pytest.mark.parametrize("max_steps", [0, 1, 3, 5])
def test_examples_are_those_that_batches_hold(max_steps):
    # 7 examples in batches of 4: every second step is 3, not 4.
    local = LocalTraining(optax.sgd(0.1), epochs=3, batch_size=4, max_steps=max_steps)
    size = np.asarray(7)
    batches = np.asarray(draw_batches(local, jax.random.key(0), jnp.arange(9), jnp.asarray(7)).rows)
    steps = int(local.steps(size))
    assert local.examples(size) == (batches[:steps] >= 0).sum()


def test_steps_shrink_from_round_to_round(clients, start):
    # One step of plain SGD: in round 3 of 4, a quarter of what it is in round 0.
    local = LocalTraining(
        optax.sgd(0.1), max_steps=1, batch_size=8, decay=optax.linear_schedule(1.0, 0.0, 4)
    )
    first, last = (
        train(
            make_client(apply, local, clients, number, slots=2),
            start,
            local,
            clients.index[0],
            20,
            [True, True],
        )
        for number in (0, 3)
    )
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: 0.25 * x, first.shared), last.shared, atol=1e-7, rtol=1e-4
    )
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(last.shared)) > 1e-4


def test_training_sees_augmented_images(clients, start):
    # Images turned to their negatives in every batch, or beforehand.
    def negative(images, bits):
        assert bits.shape == images.shape[:1]
        return 255 - images

    plain = LocalTraining(optax.sgd(0.1), epochs=2, batch_size=8)
    given_in_batches, given_before, as_they_are = (
        train(
            make_client(apply, local, data, 0, slots=2),
            start,
            local,
            clients.index[0],
            20,
            [True, True],
        )
        for local, data in (
            (plain._replace(augment=negative), clients),
            (plain, clients.replace(images=255 - clients.images)),
            (plain, clients),
        )
    )
    chex.assert_trees_all_close(given_in_batches, given_before, atol=1e-6)
    assert abs(given_in_batches.loss - as_they_are.loss) > 1e-3


def test_bits_are_drawn_for_augmentation_alone_and_padding_moves_none():
    local = LocalTraining(optax.sgd(0.1), epochs=2, batch_size=4)
    rows = jnp.arange(12)
    assert draw_batches(local, jax.random.key(0), rows, jnp.asarray(7)).bits is None
    local = local._replace(augment=flip)
    short, long = (draw_batches(local, jax.random.key(0), r, 7).bits for r in (rows[:7], rows))
    assert (short == long[: len(short)]).all()
    assert len(np.unique(short)) == short.size


def test_every_example_counts_once_an_epoch(clients, start):
    local = LocalTraining(optax.sgd(0.0), epochs=3, batch_size=8)
    client = make_client(apply, local, clients, 0, slots=2)
    size = int(clients.size[0])
    update = train(client, start, local, clients.index[0], size, [True, True])
    assert update.examples == 3 * size
    assert update.feedback.usage.sum() == 3 * size
    # With a learning rate of 0 the mean loss is that of one pass over the client's own examples.
    rows = np.asarray(clients.index[0][:size])
    logits, _ = jax.jit(apply)(start, clients.images[rows], jnp.ones(2, bool))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, clients.labels[rows])
    assert update.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert update.feedback.loss.sum() == pytest.approx(3 * float(losses.sum()), rel=1e-5)
    hits = (logits.argmax(axis=1) == clients.labels[rows]).sum()
    assert update.feedback.correct.sum() == 3 * hits


def test_padding_never_trains(clients, start):
    # The same 11 examples, once with the padding full of other images, once with zeros.
    local = LocalTraining(optax.sgd(0.1), epochs=2, batch_size=4)
    client = make_client(apply, local, clients, 0, slots=2)
    rows = np.asarray(clients.index[0][:11])
    padded = np.concatenate([rows, np.full(13, 200)]).astype(np.int32)
    zeros = np.concatenate([rows, np.zeros(13)]).astype(np.int32)
    one = train(client, start, local, padded, 11, [True, True])
    two = train(client, start, local, zeros, 11, [True, True])
    chex.assert_trees_all_equal(one, two)


def test_an_empty_slot_neither_moves_nor_reports(clients, start):
    local = LocalTraining(optax.sgd(0.1), batch_size=8, balance=0.1, z=0.01)
    client = make_client(apply, local, clients, 0, slots=2)
    update = train(client, start, local, clients.index[1], clients.size[1], [True, False])
    for leaf in jax.tree.leaves(update.experts):
        assert jnp.abs(leaf[0]).max() > 0
        assert not leaf[1].any()
    chex.assert_trees_all_equal(
        jax.tree.map(lambda g: g[1], update.gate), jax.tree.map(lambda g: g[1], start.gate)
    )
    assert update.feedback.usage[1] == 0


def test_training_lowers_the_loss(clients, start):
    local = LocalTraining(optax.sgd(0.3), epochs=12, batch_size=8)
    client = make_client(apply, local, clients, 0, slots=2)
    update = train(client, start, local, clients.index[0], clients.size[0], [True, True])
    trained = start._replace(
        shared=jax.tree.map(jnp.add, start.shared, update.shared),
        experts=jax.tree.map(jnp.add, start.experts, update.experts),
        gate=update.gate,
    )
    rows = clients.index[0][: int(clients.size[0])]

    def loss(params):
        logits, _ = jax.jit(apply)(params, clients.images[rows], jnp.ones(2, bool))
        return optax.softmax_cross_entropy_with_integer_labels(logits, clients.labels[rows]).mean()

    assert loss(trained) < 0.5 * loss(start)


def test_tiles_change_nothing_beyond_rounding(clients, start):
    updates = []
    for tile in (12, 4, 3):
        local = LocalTraining(optax.sgd(0.1), epochs=2, batch_size=12, z=0.1, tile=tile)
        client = make_client(apply, local, clients, 0, slots=2)
        # 20 examples: the last batch of each epoch is part padding, and so are its tiles.
        updates.append(train(client, start, local, clients.index[0], 20, [True, True]))
    for other in updates[1:]:
        chex.assert_trees_all_close(updates[0], other, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 200), st.integers(1, 200))
def test_tiles_are_equal_and_no_larger_than_asked_for(batch, most):
    local = LocalTraining(optax.sgd(0.1), batch_size=batch, tile=most)
    tiles = local.tiles(lambda: 0)
    assert batch % tiles == 0
    assert batch // tiles <= most
    assert local._replace(balance=0.1).tiles(lambda: 0) == 1


@pytest.mark.parametrize(
    ("batch", "megabytes", "tiles"),
    [(16, 1, 16), (16, 0.25, 4), (16, 0.01, 1), (64, 0.25, 16), (12, 1, 1), (15, 0.25, 3)],
)
def test_automatic_tiles_fit_into_a_cache(batch, megabytes, tiles):
    local = LocalTraining(optax.sgd(0.1), batch_size=batch)
    assert local.tiles(lambda: int(megabytes * 2**20)) == tiles


def test_largest_array_by_hand():
    # 5 and 7 numbers in, 35 of four bytes on the way, in a loop and behind a call; 7 out.
    @jax.jit
    def body(i, x):
        return x + (jnp.ones(5)[:, None] * x).sum(axis=0)

    assert largest_array(lambda x: jax.lax.fori_loop(0, 3, body, x), jnp.ones(7)) == 4 * 35


def test_proximal_by_hand():
    # FedProx with μ = 2: the pull of a parameter that has moved by 3 is 6; gates feel none.
    transform = proximal(2.0)
    start = Params({"w": jnp.array(1.0)}, {"w": jnp.array([5.0])}, {"g": jnp.array(0.0)}, {})
    state = transform.init(start)
    moved = Params({"w": jnp.array(4.0)}, {"w": jnp.array([4.5])}, {"g": jnp.array(9.0)}, {})
    gradient = jax.tree.map(jnp.ones_like, moved)
    pulled, state = transform.update(gradient, state, moved)
    assert (pulled.shared["w"], pulled.experts["w"][0], pulled.gate["g"]) == (7.0, 0.0, 1.0)
    chex.assert_trees_all_equal(state, start)


def test_a_strong_pull_keeps_a_client_near_the_server(clients, start):
    def distance(*before):
        local = LocalTraining(optax.chain(*before, optax.sgd(0.1)), epochs=2, batch_size=8)
        client = make_client(apply, local, clients, 0, slots=2)
        update = train(client, start, local, clients.index[0], clients.size[0], [True, True])
        return float(optax.tree.norm((update.shared, update.experts)))

    assert distance(proximal(5.0)) < 0.5 * distance()
