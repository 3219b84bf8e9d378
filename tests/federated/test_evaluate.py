from __future__ import annotations

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flexmoe_jax.federated import chunk_test_set

from flexmoe_jax import federated
from flexmoe_jax.metrics import accuracies
from flexmoe_jax.types import Params


@pytest.fixture(scope="module")
def federation(make_algorithm):
    algorithm = make_algorithm()
    state = algorithm.init(jax.random.key(0))
    slots = jnp.array([[0, 1, 4], [2, 4, 4], [1, 2, 3], [0, 4, 4], [0, 3, 4], [1, 2, 3], [4, 4, 4]])
    return algorithm, state._replace(slots=slots)


def test_chunks_keep_every_example_once():
    images = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)
    test = chunk_test_set(images, np.arange(7), batch_size=3)
    assert test.labels.tolist() == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
    assert (np.asarray(test.images).reshape(9, 2, 2, 1)[:7] == images).all()


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_share_the_images(make_algorithm, federation, clients, digits, devices):
    algorithm, state = federation
    mesh = federated.client_mesh(devices)
    images, labels = digits.test_images[:37], digits.test_labels[:37]
    alone = algorithm.evaluate(state, chunk_test_set(images, labels, 20), clients.label_share)
    shared = make_algorithm(mesh=mesh).evaluate(
        federated.replicate(state, mesh),
        chunk_test_set(images, labels, 20, mesh),
        federated.replicate(clients.label_share, mesh),
    )
    chex.assert_trees_all_close(jax.device_get(alone), jax.device_get(shared), atol=1e-6)


def test_against_a_plain_loop(federation, clients, digits):
    """One client at a time, one whole model each, in NumPy."""
    from flexmoe_jax import models
    from tests.federated.conftest import EXPERTS, prepare

    algorithm, state = federation
    labels = digits.test_labels
    test = chunk_test_set(digits.test_images, labels, batch_size=33)
    result = algorithm.evaluate(state, test, clients.label_share)

    model = models.MoEClassifier(models.MLP((16,)), classes=10, experts=EXPERTS, hidden=8)
    images = prepare(jnp.asarray(digits.test_images))
    mean = 0.0
    for client in range(6):  # client 6 has never held an expert
        held = jnp.zeros(EXPERTS, bool).at[state.slots[client]].set(True, mode="drop")
        gate = jax.tree.map(lambda leaf, client=client: leaf[client], state.gates)
        params = models.merge_params(Params(state.shared, state.experts, gate, private={}))
        logits = np.asarray(jax.jit(model.apply)({"params": params}, images, held)[0])
        hit = logits.argmax(axis=1) == labels
        mean = mean + np.asarray(jax.nn.softmax(logits)) / 6
        assert result.global_accuracy[client] == pytest.approx(hit.mean(), abs=1e-6)
        by_class = np.array([hit[labels == y].mean() for y in range(10)])
        assert np.allclose(result.class_accuracy[client], by_class, atol=1e-6)
        personal = by_class @ np.asarray(clients.label_share[client])
        assert result.personal_accuracy[client] == pytest.approx(personal, abs=1e-5)
    assert result.server_accuracy == pytest.approx((mean.argmax(axis=1) == labels).mean(), abs=1e-6)
    assert result.evaluated.tolist() == [True] * 6 + [False]
    summary = accuracies(result)
    assert summary["eval/clients"] == 6
    assert summary["eval/global_accuracy"] == pytest.approx(
        float(result.global_accuracy[:6].mean()), abs=1e-6
    )


def test_a_class_that_the_test_set_lacks_is_left_out(federation, clients, digits):
    algorithm, state = federation
    some = digits.test_labels != 3
    test = chunk_test_set(digits.test_images[some], digits.test_labels[some])
    result = algorithm.evaluate(state, test, clients.label_share)
    assert np.isnan(result.class_accuracy[:, 3]).all()
    assert np.isfinite(result.personal_accuracy).all()
    shares = np.asarray(clients.label_share[0]).copy()
    shares[3] = 0
    expected = np.nansum(result.class_accuracy[0] * shares) / shares.sum()
    assert result.personal_accuracy[0] == pytest.approx(expected, abs=1e-5)


def test_a_client_none_of_whose_classes_are_there_has_no_personal_accuracy(
    federation, clients, digits
):
    algorithm, state = federation
    share = jnp.zeros_like(clients.label_share).at[:, 3].set(1.0).at[0].set(0.1)
    some = digits.test_labels != 3
    test = chunk_test_set(digits.test_images[some], digits.test_labels[some])
    result = algorithm.evaluate(state, test, share)
    assert np.isnan(result.personal_accuracy).tolist() == [False] + [True] * 6
    figures = accuracies(result)
    assert figures["eval/personal_clients"] == 1
    assert figures["eval/personal_accuracy"] == pytest.approx(
        np.nanmean(result.class_accuracy[0]), abs=1e-6
    )


def of_every_client(federation, clients, digits):
    """Which images each client gets right, (C, M), one by one."""
    algorithm, state = federation
    images, labels = digits.test_images, digits.test_labels
    test = chunk_test_set(images, labels, 1, owner=np.zeros(len(labels)))
    alone = [jax.tree.map(lambda x, i=i: x[i : i + 1], test) for i in range(len(labels))]
    hits = [algorithm.evaluate(state, one, clients.label_share).hits.sum(axis=1) for one in alone]
    return np.stack(hits, axis=1)


@pytest.fixture(scope="module")
def right(federation, clients, digits):
    return of_every_client(federation, clients, digits)


@hypothesis.settings(max_examples=10)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), nobody=st.booleans())
def test_own_examples_are_counted_for_their_owners_in_any_order(
    federation, clients, digits, right, seed, nobody
):
    """Whoever owns what, and however the rows stand: the same sums as counted one by one."""
    algorithm, state = federation
    rng = np.random.default_rng(seed)
    labels, size = digits.test_labels, len(digits.test_labels)
    owner = rng.integers(-1 if nobody else 0, 7, size)
    owner[owner == 4] = 2  # client 4 has none of its own
    order = rng.permutation(size)
    test = chunk_test_set(digits.test_images[order], labels[order], 33, owner=owner[order])
    result = algorithm.evaluate(state, test, clients.label_share)
    mine = owner == np.arange(7)[:, None]
    assert np.array_equal(result.personal_hits[:6], (right * mine).sum(axis=1)[:6])
    assert np.array_equal(result.personal_weight, mine.sum(axis=1))
    assert np.array_equal(result.hits.sum(axis=1)[:6], right.sum(axis=1)[:6])
    assert accuracies(result)["eval/personal_clients"] == 5
    expected = [right[c, owner == c].mean() for c in (0, 1, 2, 3, 5)]
    assert accuracies(result)["eval/personal_accuracy"] == pytest.approx(np.mean(expected))


def test_devices_count_own_examples_alike(make_algorithm, federation, clients, digits):
    algorithm, state = federation
    mesh = federated.client_mesh(8)
    owner = np.arange(len(digits.test_labels)) % 6
    arrays = digits.test_images, digits.test_labels
    alone = algorithm.evaluate(state, chunk_test_set(*arrays, owner=owner), clients.label_share)
    shared = make_algorithm(mesh=mesh).evaluate(
        federated.replicate(state, mesh),
        chunk_test_set(*arrays, 30, mesh, owner),
        federated.replicate(clients.label_share, mesh),
    )
    chex.assert_trees_all_equal(jax.device_get(alone), jax.device_get(shared))


@hypothesis.settings(max_examples=5)
@hypothesis.given(order=st.permutations(range(7)))
def test_the_order_of_the_clients_changes_no_figure(federation, clients, digits, order):
    algorithm, state = federation
    order = np.array(order)
    owner = np.arange(len(digits.test_labels)) % 5
    moved = state._replace(
        slots=state.slots[order], gates=jax.tree.map(lambda gate: gate[order], state.gates)
    )
    arrays, back = (digits.test_images, digits.test_labels, 50), np.argsort(order)
    for owners, theirs in ((None, None), (owner, back[owner])):
        before = algorithm.evaluate(
            state, chunk_test_set(*arrays, owner=owners), clients.label_share
        )
        after = algorithm.evaluate(
            moved, chunk_test_set(*arrays, owner=theirs), clients.label_share[order]
        )
        assert np.array_equal(np.asarray(before.hits)[order], after.hits)
        assert accuracies(after) == pytest.approx(accuracies(before), rel=1e-6)
