from __future__ import annotations

import jax
import numpy as np
import pytest

from flexmoe_jax.data import Dataset, build_clients, label_counts
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
    assert np.array_equal(clients.images, dataset.train_images)
    assert np.array_equal(clients.labels, dataset.train_labels)
    assert [leaf.dtype.name for leaf in jax.tree.leaves(clients)] == [
        "uint8",
        "int32",
        "int32",
        "int32",
        "float32",
    ]


def test_label_counts_by_hand(dataset: Dataset) -> None:
    parts = [np.array([1, 2, 4]), np.array([], np.int64)]
    assert label_counts(dataset.train_labels, parts, 3).tolist() == [[1, 0, 2], [0, 0, 0]]


@pytest.mark.parametrize("parts", [[], [np.array([0]), np.array([], np.int64)]])
def test_clients_without_examples_are_refused(dataset: Dataset, parts: list[np.ndarray]) -> None:
    with pytest.raises(InputError, match="parts="):
        build_clients(dataset, parts)


def test_dataset_knows_its_shape(dataset: Dataset) -> None:
    assert dataset.num_classes == 3
    assert dataset.image_shape == (2, 2, 1)
