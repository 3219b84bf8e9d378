from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.data import (
    Dataset,
    build_clients,
    draw_newcomers,
    feed_cohorts,
    label_counts,
)
from flexmoe_jax.errors import InputError


@pytest.fixture
def dataset() -> Dataset:
    images = np.arange(5 * 2 * 2 * 1, dtype=np.uint8).reshape(5, 2, 2, 1)
    labels = np.array([0, 2, 2, 1, 0], np.int32)
    return Dataset("toy", images, labels, images[:1], labels[:1], ("a", "b", "c"))


def test_clients_by_hand(dataset: Dataset) -> None:
    clients = build_clients(dataset, [np.array([1, 2, 4]), np.array([3]), np.array([0])])
    assert clients.index.tolist() == [[1, 2, 4], [3, 0, 0], [0, 0, 0]]
    assert clients.size.tolist() == [3, 1, 1]
    # Client 0 holds labels 2, 2, 0.
    np.testing.assert_allclose(clients.label_share, [[1 / 3, 0, 2 / 3], [0, 1, 0], [1, 0, 0]])
    assert np.array_equal(clients.arrays["images"], dataset.train_images)
    assert np.array_equal(clients.arrays["labels"], dataset.train_labels)
    assert [leaf.dtype.name for leaf in jax.tree.leaves(clients)] == [
        "uint8",
        "int32",
        "int32",
        "int32",
        "float32",
    ]


@given(st.data())
def test_a_cohort_is_fed_its_own_examples_in_arrays_of_one_shape(draw: st.DataObject) -> None:
    rows = st.lists(st.integers(0, 8), min_size=1, max_size=6)
    parts = [np.array(part) for part in draw.draw(st.lists(rows, min_size=2, max_size=5))]
    images = np.arange(9 * 4, dtype=np.uint8).reshape(9, 2, 2, 1)
    labels = np.arange(9, dtype=np.int32)
    dataset = Dataset("toy", images, labels, images[:1], labels[:1], tuple("abcdefghi"))
    clients = build_clients(dataset, parts, place=np.asarray)
    most = draw.draw(st.integers(1, len(parts)))
    feed = feed_cohorts(clients, most)
    cohorts = st.lists(st.sampled_from(range(len(parts))), unique=True, max_size=most)
    shapes = set()
    for cohort in map(partial(np.array, dtype=int), (draw.draw(cohorts), draw.draw(cohorts))):
        fed = feed(cohort)
        shapes.add(str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), fed)))
        for client in cohort:
            own = fed.index[client, : fed.size[client]]
            assert np.array_equal(fed.arrays["images"][own], images[parts[client]])
            assert np.array_equal(fed.arrays["labels"][own], labels[parts[client]])
    assert len(shapes) == 1


def test_label_counts_by_hand(dataset: Dataset) -> None:
    parts = [np.array([1, 2, 4]), np.array([], np.int64)]
    assert label_counts(dataset.train_labels, parts, 3).tolist() == [[1, 0, 2], [0, 0, 0]]


@pytest.mark.parametrize("parts", [[], [np.array([0]), np.array([], np.int64)]])
def test_clients_without_examples_are_refused(dataset: Dataset, parts: list[np.ndarray]) -> None:
    with pytest.raises(InputError, match="parts="):
        build_clients(dataset, parts)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"train_labels": [0, 2, 2, 1]}, r"train_labels=int64 of shape \(4,\): .*each of 5 images"),
        ({"test_labels": [0, 1]}, r"test_labels=int64 of shape \(2,\): .*each of 1 images"),
        ({"train_labels": [0.0, 1, 2, 1, 0]}, r"train_labels=float64 of shape \(5,\): .*whole"),
        ({"train_labels": [0, 2, 3, 1, 0]}, "train_labels=3: number the 3 classes from 0 to 2"),
        ({"test_labels": [-1]}, "test_labels=-1: number the 3 classes from 0 to 2"),
        ({"test_images": np.zeros((1, 2, 3, 1))}, r"test_images=\(2, 3, 1\): .*\(2, 2, 1\)"),
        ({"train_clients": [0, 1]}, r"train_clients=int64 of shape \(2,\): .*each of 5"),
        ({"test_images": np.zeros((0, 2, 2, 1)), "test_labels": np.zeros(0, int)}, "test_labels="),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(
    dataset: Dataset, change: dict[str, Any], line: str
) -> None:
    arrays: dict[str, Any] = {key: np.array(value) for key, value in change.items()}
    with pytest.raises(InputError, match=f"^{line}"):
        dataclasses.replace(dataset, **arrays)


def test_dataset_knows_its_shape(dataset: Dataset) -> None:
    assert dataset.num_classes == 3
    assert dataset.image_shape == (2, 2, 1)
    assert dataset.num_owners == 0
    assert dataclasses.replace(dataset, train_clients=np.array([9, 4, 9, 9, 4])).num_owners == 2


@given(st.integers(1, 40), st.integers(0, 39), st.integers(0, 9))
def test_newcomers_are_drawn_and_all_others_train(clients: int, newcomers: int, seed: int) -> None:
    if newcomers >= clients:
        with pytest.raises(InputError, match=rf"clients.newcomers={newcomers}: choose 0 to"):
            draw_newcomers(clients, newcomers, seed)
        return
    trained, coming = draw_newcomers(clients, newcomers, seed)
    assert len(coming) == newcomers
    assert sorted([*trained, *coming]) == list(range(clients))
    assert (np.diff(trained) > 0).all()
    assert (np.diff(coming) > 0).all()
    again = draw_newcomers(clients, newcomers, seed)
    assert np.array_equal(again[1], coming)


def test_the_newcomers_differ_with_the_seed() -> None:
    assert len({tuple(draw_newcomers(30, 3, seed)[1]) for seed in range(9)}) > 5


def test_some_clients_and_a_few_of_their_examples(dataset: Dataset) -> None:
    parts = [np.array([1, 2, 4, 0, 3]), np.array([3]), np.array([0, 2])]
    clients = build_clients(dataset, parts, place=np.asarray)
    some = clients.of(np.array([1, 2]))
    assert some.index.tolist() == [[3, 0], [0, 2]]
    assert some.arrays is clients.arrays
    assert some.label_share.tolist() == clients.label_share[[1, 2]].tolist()

    few = clients.few(2, seed=0)
    assert few.size.tolist() == [2, 1, 2]
    assert len(few.arrays["labels"]) == 5
    for part, rows, size in zip(parts, few.index, few.size, strict=True):
        found = few.arrays["images"][rows[:size]]
        assert len(np.unique(found, axis=0)) == size
        assert all(
            (dataset.train_images[part] == image).all(axis=(1, 2, 3)).any() for image in found
        )
    # What is known of a client is that of all its examples.
    assert few.label_share is clients.label_share
    drawn = {clients.few(2, seed).arrays["images"][:2].tobytes() for seed in range(9)}
    assert len(drawn) > 1
