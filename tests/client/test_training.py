from __future__ import annotations

from dataclasses import replace
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax import tasks
from flexmoe_jax.client import Learner, LocalTraining, draw_batches, proximal, scale_experts, train
from flexmoe_jax.client.training import Known, Trained, _gradient, largest_array
from flexmoe_jax.data import flip
from flexmoe_jax.models import MLP, MoEClassifier, MoELayer, classifier, from_linen, lay_out
from flexmoe_jax.types import Download, Params

MODEL = classifier(MoEClassifier(MLP((6,)), classes=10, experts=2, hidden=4)).after(
    lambda images: images.astype(jnp.float32) / 255
)
TASK = tasks.classification()
SHAPES = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
LAYOUT = lay_out(SHAPES)
HELD = (True, True)


def apply(params, inputs, held):
    return MODEL.apply(LAYOUT.merge(params), inputs, held)


@pytest.fixture(scope="module")
def start() -> Params:
    return LAYOUT.split(jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))


def fit(start, local, arrays, index, size, held=HELD, number=0, log_share=None) -> Trained:
    """Trains a client in round `number`, starting from experts 0 and 1."""
    size, number = np.asarray(size, np.int32), np.asarray(number, np.int32)
    return run(local, start, arrays, np.asarray(index), size, np.asarray(held), number, log_share)


@partial(jax.jit, static_argnums=0)
def run(local, start, arrays, index, size, held, number, log_share) -> Trained:
    batches = draw_batches(local, jax.random.key(0), index, size)
    slots = jnp.array([[0, 1]])
    down = Download(start.shared, start.experts, slots, local.steps(size), number)
    learner = Learner(apply, TASK, local, LAYOUT.layers)
    return train(learner, start, arrays, batches, {"mixture": held}, down, log_share)


draw = jax.jit(draw_batches, static_argnums=0)


def one_client(clients, number=0):
    """Rows and size of a client."""
    return np.asarray(clients.index)[number], np.asarray(clients.size)[number]


def change(start: Params, done: Trained) -> tuple:
    return jax.tree.map(np.subtract, done.params[:2], start[:2])


@jax.jit
def judge(start, batch):
    """Logits and routings of an untrained client, and the loss of each example."""
    logits, routings = apply(start, batch["images"], {"mixture": jnp.ones(2, bool)})
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return logits, routings, losses


@given(st.integers(1, 500), st.integers(1, 7), st.integers(1, 64), st.integers(0, 20))
def test_steps_cover_every_epoch(size, epochs, batch, cap):
    local = LocalTraining(
        optax.sgd(0.1), balance=0.0, epochs=epochs, batch_size=batch, max_steps=cap
    )
    steps = int(local.steps(jnp.asarray(size)))
    whole = epochs * int(np.ceil(size / batch))
    assert steps == (min(whole, cap) if cap else whole)


@pytest.mark.parametrize(
    ("size", "padding", "epochs", "batch_size"), [(1, 0, 1, 1), (7, 5, 3, 4), (12, 3, 2, 6)]
)
def test_batches_hold_every_example_once_an_epoch(size, padding, epochs, batch_size):
    local = LocalTraining(optax.sgd(0.1), balance=0.0, epochs=epochs, batch_size=batch_size)
    rows = np.arange(100, 100 + size + padding)
    batches = np.asarray(draw(local, jax.random.key(0), rows, size).rows)
    assert batches.shape == (local.steps(np.asarray(size + padding)), batch_size)
    steps, per_epoch = int(local.steps(np.asarray(size))), -(-size // batch_size)
    for epoch in np.split(batches[:steps], epochs):
        assert len(epoch) == per_epoch
        assert sorted(epoch[epoch >= 0]) == list(rows[:size])
    assert (batches[steps:] == -1).all()
    # Another client's size, which decides the padding, changes nothing.
    alone = np.asarray(draw(local, jax.random.key(0), rows[:size], size).rows)
    assert (batches[:steps] == alone).all()


@pytest.mark.parametrize("max_steps", [0, 1, 3, 5])
def test_examples_are_those_that_batches_hold(max_steps):
    # 7 examples in batches of 4: every second step is 3, not 4.
    local = LocalTraining(optax.sgd(0.1), balance=0.0, epochs=3, batch_size=4, max_steps=max_steps)
    size = np.asarray(7)
    batches = np.asarray(draw(local, jax.random.key(0), np.arange(9), 7).rows)
    steps = int(local.steps(size))
    assert local.examples(size) == (batches[:steps] >= 0).sum()


def test_steps_shrink_from_round_to_round(clients, start):
    # One step of plain SGD: in round 3 of 4, a quarter of what it is in round 0.
    local = LocalTraining(
        optax.sgd(0.1),
        balance=0.0,
        max_steps=1,
        batch_size=8,
        decay=optax.linear_schedule(1.0, 0.0, 4),
    )
    first, last = (
        change(start, fit(start, local, clients.arrays, one_client(clients)[0], 20, number=number))[
            0
        ]
        for number in (0, 3)
    )
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: np.float32(0.25) * x, first), last, atol=1e-7, rtol=1e-4
    )
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(last)) > 1e-4


def test_any_schedule_scales_the_steps(clients, start):
    # Optax's constant one gives a plain number.
    halved, whole = (
        change(start, fit(start, local, clients.arrays, one_client(clients)[0], 20))
        for local in (
            LocalTraining(
                optax.sgd(0.1), balance=0.0, max_steps=1, decay=optax.constant_schedule(0.5)
            ),
            LocalTraining(optax.sgd(0.1), balance=0.0, max_steps=1),
        )
    )
    chex.assert_trees_all_close(
        halved, jax.tree.map(lambda x: np.float32(0.5) * x, whole), atol=1e-7
    )


def test_a_prior_is_added_to_what_the_loss_is_taken_of(clients, start):
    log_share = np.log(np.arange(1.0, 11.0, dtype=np.float32) / 55)
    batch = own_batch(clients)
    logits, *_ = judge(start, batch)
    logits = np.asarray(logits)
    data = clients.arrays, *one_client(clients)
    for tau in (0.0, 2.0):
        local = LocalTraining(optax.sgd(0.0), balance=0.0, batch_size=8, prior=tau)
        done = fit(start, local, *data, log_share=log_share)
        adjusted = logits + tau * log_share[None]
        expected = cross_entropy(adjusted, batch["labels"])
        assert done.loss == pytest.approx(float(expected.sum()), rel=1e-5)


def test_training_sees_augmented_images(clients, start):
    # Images turned to their negatives in every batch, or beforehand.
    def negative(batch, bits):
        assert bits.shape == batch["images"].shape[:1]
        return batch | {"images": 255 - batch["images"]}

    plain = LocalTraining(optax.sgd(0.1), balance=0.0, epochs=2, batch_size=8)
    before = clients.arrays | {"images": 255 - np.asarray(clients.arrays["images"])}
    given_in_batches, given_before, as_they_are = (
        fit(start, local, arrays, one_client(clients)[0], 20)
        for local, arrays in (
            (replace(plain, augment=negative), clients.arrays),
            (plain, before),
            (plain, clients.arrays),
        )
    )
    chex.assert_trees_all_close(given_in_batches, given_before, atol=1e-6, rtol=1e-6)
    assert abs(given_in_batches.loss - as_they_are.loss) > 1e-3 * as_they_are.units


def test_bits_are_drawn_for_augmentation_alone_and_padding_moves_none():
    local = LocalTraining(optax.sgd(0.1), balance=0.0, epochs=2, batch_size=4)
    rows = np.arange(12)
    assert draw(local, jax.random.key(0), rows, 7).bits is None
    local = replace(local, augment=lambda batch, bits: batch | {"x": flip(batch["x"], bits)})
    short, long = (draw(local, jax.random.key(0), r, 7).bits for r in (rows[:7], rows))
    short, long = np.asarray(short), np.asarray(long)
    assert (short == long[: len(short)]).all()
    assert len(np.unique(short)) == short.size


cross_entropy = jax.jit(optax.softmax_cross_entropy_with_integer_labels)


def own_rows(clients, number=0, most=None):
    return np.asarray(clients.index)[number, : int(np.asarray(clients.size)[number])][:most]


def own_batch(clients):
    return {name: np.asarray(x)[own_rows(clients)] for name, x in clients.arrays.items()}


def test_every_example_counts_once_an_epoch(clients, start):
    local = LocalTraining(optax.sgd(0.0), balance=0.0, epochs=3, batch_size=8)
    size = int(one_client(clients)[1])
    done = fit(start, local, clients.arrays, one_client(clients)[0], size)
    assert done.examples == done.units == 3 * size
    assert done.feedback.usage.sum() == 3 * size
    # With a learning rate of 0 the mean loss is that of one pass over the client's own examples.
    batch = own_batch(clients)
    logits, routings, losses = jax.device_get(judge(start, batch))
    done = jax.device_get(done)
    assert done.loss / done.units == pytest.approx(float(losses.mean()), rel=1e-5)
    assert done.feedback.loss.sum() == pytest.approx(3 * float(losses.sum()), rel=1e-5)
    hits = logits.argmax(axis=1) == batch["labels"]
    assert done.feedback.correct.sum() == 3 * int(hits.sum())
    # And so by expert.
    routed = np.asarray(routings["mixture"].selected, float)
    assert done.feedback.usage[0].tolist() == (3 * routed.sum(axis=0)).tolist()
    assert done.feedback.correct[0].tolist() == (3 * np.asarray(hits) @ routed).tolist()
    assert np.allclose(done.feedback.loss[0], 3 * np.asarray(losses) @ routed, rtol=1e-5)


def test_padding_never_trains(clients, start):
    # The same 11 examples, once with the padding full of other images, once with zeros.
    local = LocalTraining(optax.sgd(0.1), balance=0.0, epochs=2, batch_size=4)
    rows = own_rows(clients, most=11)
    padded = np.concatenate([rows, np.full(13, 200)]).astype(np.int32)
    zeros = np.concatenate([rows, np.zeros(13)]).astype(np.int32)
    one, two = (fit(start, local, clients.arrays, index, 11) for index in (padded, zeros))
    chex.assert_trees_all_equal(one, two)


def test_an_empty_slot_neither_moves_nor_reports(clients, start):
    local = LocalTraining(optax.sgd(0.1), batch_size=8, balance=0.1, z=0.01)
    data = clients.arrays, *one_client(clients, 1)
    done = fit(start, local, *data, held=(True, False))
    for leaf in jax.tree.leaves(change(start, done)[1]):
        assert np.abs(leaf[0]).max() > 0
        assert not leaf[1].any()
    chex.assert_trees_all_equal(
        *(jax.tree.map(lambda g: np.asarray(g)[1], p.gate) for p in (done.params, start))
    )
    assert np.asarray(done.feedback.usage)[0, 1] == 0


def test_training_lowers_the_loss(clients, start):
    local = LocalTraining(optax.sgd(0.3), balance=0.0, epochs=12, batch_size=8)
    done = fit(start, local, clients.arrays, *one_client(clients))
    batch = own_batch(clients)

    @jax.jit
    def loss(params):
        logits, _ = apply(params, batch["images"], {"mixture": jnp.ones(2, bool)})
        return TASK.loss(logits, batch).mean()

    assert float(loss(done.params)) < 0.5 * float(loss(start))


def test_tiles_change_nothing_beyond_rounding(clients, start):
    runs = []
    for tile in (12, 4, 3):
        local = LocalTraining(
            optax.sgd(0.1), balance=0.0, epochs=2, batch_size=12, z=0.1, tile=tile
        )
        # 20 examples: the last batch of each epoch is part padding, and so are its tiles.
        runs.append(fit(start, local, clients.arrays, one_client(clients)[0], 20))
    for other in runs[1:]:
        chex.assert_trees_all_close(runs[0], other, atol=1e-5, rtol=1e-5)


class Texts(nn.Module):
    """A layer that routes whole texts."""

    @nn.compact
    def __call__(self, x):
        return MoELayer(2, 4, whole=True, with_router=True, name="mixture")(x)


def test_tiles_change_nothing_where_texts_of_unequal_length_are_routed_whole():
    model, x = from_linen(Texts()), jax.random.normal(jax.random.key(0), (12, 5, 3))
    layout = lay_out(jax.eval_shape(model.init, jax.random.key(0), x[:1]))
    start = layout.split(jax.jit(model.init)(jax.random.key(0), x[:1]))
    task = tasks.next_token()._replace(
        inputs=lambda batch: batch["x"],
        loss=lambda outputs, batch: (outputs**2).mean(axis=-1),
        hits=None,
        weight=lambda batch: batch["weight"],
    )
    long = np.arange(5) <= np.arange(12)[:, None] % 5
    batch = {"x": x, "weight": long.astype(np.float32)}
    known = Known({}, {"mixture": jnp.ones(2, bool)}, None, {"mixture": jnp.arange(2)})
    slopes = []
    for tile in (12, 4, 3):
        learner = Learner(
            lambda params, inputs, held: model.apply(layout.merge(params), inputs, held),
            task,
            LocalTraining(optax.sgd(0.1), balance=0.0, batch_size=12, z=0.5, tile=tile),
            layout.layers,
        )
        slopes.append(jax.jit(partial(_gradient, learner))(start, batch, jnp.ones(12), known)[0])
    for other in slopes[1:]:
        chex.assert_trees_all_close(slopes[0], other, atol=1e-6, rtol=1e-5)


@given(st.integers(1, 200), st.integers(1, 200))
def test_tiles_are_equal_and_no_larger_than_asked_for(batch, most):
    local = LocalTraining(optax.sgd(0.1), balance=0.0, batch_size=batch, tile=most)
    tiles = local.tiles(lambda: 0)
    assert batch % tiles == 0
    assert batch // tiles <= most
    assert replace(local, balance=0.1).tiles(lambda: 0) == 1


@pytest.mark.parametrize(
    ("batch", "megabytes", "tiles"),
    [(16, 1, 16), (16, 0.25, 4), (16, 0.01, 1), (64, 0.25, 16), (12, 1, 1), (15, 0.25, 3)],
)
def test_automatic_tiles_fit_into_a_cache(batch, megabytes, tiles):
    local = LocalTraining(optax.sgd(0.1), balance=0.0, batch_size=batch)
    assert local.tiles(lambda: int(megabytes * 2**20)) == tiles


def test_largest_array_by_hand():
    # 5 and 7 numbers in, 35 of four bytes on the way, in a loop and behind a call; 7 out.
    @jax.jit
    def body(i, x):
        return x + (jnp.ones((5, 1), jnp.float32) * x[None]).sum(axis=0)

    numbers = jnp.ones(7, jnp.float32)
    assert largest_array(lambda x: jax.lax.fori_loop(0, 3, body, x), numbers) == 4 * 35


MOVED = Params({"w": jnp.array(4.0)}, {"w": jnp.array([4.5])}, {"g": jnp.array(9.0)}, {})


def test_proximal_by_hand():
    # FedProx with μ = 2: the pull of a parameter that has moved by 3 is 6; gates feel none.
    transform = proximal(2.0)
    start = Params({"w": jnp.array(1.0)}, {"w": jnp.array([5.0])}, {"g": jnp.array(0.0)}, {})
    state = transform.init(start)
    gradient = jax.tree.map(jnp.ones_like, MOVED)
    pulled, state = transform.update(gradient, state, MOVED)
    assert (pulled.shared["w"], pulled.experts["w"][0], pulled.gate["g"]) == (7.0, 0.0, 1.0)
    chex.assert_trees_all_equal(state, start)


def test_steps_of_experts_and_gates_alone_are_scaled():
    transform = scale_experts(4.0)
    steps = MOVED._replace(private={"p": jnp.array(3.0)})
    scaled, _ = transform.update(steps, transform.init(steps), steps)
    assert (scaled.shared["w"], scaled.experts["w"][0]) == (4, 18)
    assert (scaled.gate["g"], scaled.private["p"]) == (36, 3)


def test_a_strong_pull_keeps_a_client_near_the_server(clients, start):
    def distance(*before):
        local = LocalTraining(
            optax.chain(*before, optax.sgd(0.1)), balance=0.0, epochs=2, batch_size=8
        )
        done = fit(start, local, clients.arrays, *one_client(clients))
        return float(np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(change(start, done)))))

    assert distance(proximal(5.0)) < 0.5 * distance()
