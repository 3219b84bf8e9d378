from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flexmoe_jax.data import Dataset, digest, fingerprint
from tests.data.conftest import load


def dataset(**changes: object) -> Dataset:
    arrays = {
        "name": "a",
        "train_images": np.arange(24, dtype=np.uint8).reshape(6, 2, 2, 1),
        "train_labels": np.array([0, 1, 0, 1, 0, 1], np.int32),
        "test_images": np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1),
        "test_labels": np.array([0, 1], np.int32),
        "classes": ("cat", "dog"),
        "train_clients": np.array([3, 3, 4, 4, 5, 5]),
        "test_clients": np.array([3, 4]),
    }
    return Dataset(**{**arrays, **changes})


def test_where_data_come_from_makes_no_difference():
    known = fingerprint(dataset())
    assert len(known) == len(set(known.values())) == 7
    assert fingerprint(dataset(name="b", notes=("read with care",))) == known
    flipped = np.asfortranarray(dataset().train_images)
    assert fingerprint(dataset(train_images=flipped)) == known


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("train_images", dataset().train_images[::-1]),
        ("train_images", dataset().train_images.astype(np.float32)),
        ("train_labels", np.array([1, 0, 0, 1, 0, 1], np.int32)),
        ("test_images", np.zeros((2, 2, 2, 1), np.uint8)),
        ("test_labels", np.array([1, 1], np.int32)),
        ("classes", ("cat", "Dog")),
        ("train_clients", np.array([3, 3, 4, 4, 5, 6])),
        ("test_clients", np.array([3, 5])),
    ],
)
def test_every_array_counts(name, other):
    known, found = fingerprint(dataset()), fingerprint(dataset(**{name: other}))
    assert {key for key in known if known[key] != found[key]} == {name}


def test_what_is_not_there_has_no_hash():
    alone = dataset(train_clients=None, test_clients=None)
    assert fingerprint(alone).keys() == fingerprint(dataset()).keys() - {
        "train_clients",
        "test_clients",
    }


def test_hashes_are_the_same_on_every_machine():
    """Recorded once: BLAKE2b of type, shape and little-endian values."""
    assert digest(np.arange(3, dtype=">i4")) == digest(np.arange(3, dtype="<i4"))
    assert digest(np.arange(6)) != digest(np.arange(6).reshape(2, 3))
    assert digest(np.zeros(0)) != digest(np.zeros((0, 3)))
    assert digest(np.arange(3, dtype=np.int32)) == "8ae59610221a74744f940f4e341fc31b"
    limited = load("digits", train_limit=50, test_limit=20)
    assert fingerprint(limited) == fingerprint(dataclasses.replace(limited, name="other"))
