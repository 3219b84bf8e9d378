from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.data import dirichlet, iid, k_class, label_counts, shards
from flexmoe_jax.errors import InputError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_iid_gives_equal_sizes() -> None:
    parts = iid()(np.zeros(11, np.int64), 4, rng())
    assert sorted(len(part) for part in parts) == [2, 3, 3, 3]  # 11 = 4 · 2 + 3


def test_k_class_is_even_over_classes_and_clients() -> None:
    labels = np.arange(2000) % 10
    parts = k_class(4)(labels, 20, rng())
    counts = label_counts(labels, parts, 10)
    assert ((counts > 0).sum(axis=1) == 4).all()
    assert ((counts > 0).sum(axis=0) == 8).all()  # 20 clients · 4 / 10 classes
    assert set(counts[counts > 0]) == {25}  # 200 examples / 8 holders


def test_k_class_gives_a_rare_class_no_more_holders_than_examples() -> None:
    labels = np.repeat([0, 1, 2], [2, 50, 50])
    parts = k_class(2)(labels, 10, rng())
    counts = label_counts(labels, parts, 3)
    assert ((counts > 0).sum(axis=1) == 2).all()
    # Of the 20 slots class 0 can take 2, so the others take 9 each.
    assert (counts > 0).sum(axis=0).tolist() == [2, 9, 9]


def test_k_class_raises_the_poor_to_the_minimum() -> None:
    # An even split leaves a client of class 0 alone with 10 / 2 = 5, but one of class 1 with 45.
    labels = np.repeat([0, 1, 2], [10, 90, 90])
    parts = k_class(2, min_per_client=30)(labels, 4, rng())
    counts = label_counts(labels, parts, 3)
    assert counts.sum(axis=1).min() >= 30
    assert ((counts > 0).sum(axis=1) == 2).all()


def test_k_class_refuses_a_minimum_that_its_classes_cannot_give() -> None:
    # With one class each, one of the clients has class 0 and its only example.
    with pytest.raises(InputError, match=r"partition\.min_per_client=2: .*too few examples"):
        k_class(1, min_per_client=2)(np.repeat([0, 1], [1, 50]), 2, rng())


def test_k_class_refuses_classes_too_rare_for_everybody() -> None:
    # Class 0 serves 1 client and class 1 all 5: 6 of the 10 slots.
    with pytest.raises(InputError, match=r"partition\.classes_per_client=2: the rare classes"):
        k_class(2)(np.repeat([0, 1], [1, 50]), 5, rng())


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 12), st.integers(1, 40), st.data())
def test_k_class_covers_every_class(
    num_classes: int, num_clients: int, data: st.DataObject
) -> None:
    fewest = -(-num_classes // num_clients)
    k = data.draw(st.integers(fewest, num_classes))
    labels = np.arange(num_classes * num_clients) % num_classes
    parts = k_class(k)(labels, num_clients, rng(data.draw(st.integers(0, 99))))
    counts = label_counts(labels, parts, num_classes)
    assert ((counts > 0).sum(axis=1) == k).all()
    holders = (counts > 0).sum(axis=0)
    assert holders.min() >= 1
    assert holders.max() - holders.min() <= 1


@pytest.mark.parametrize("alpha", [1e15, 1e300, np.finfo(np.float64).max])
def test_dirichlet_of_the_largest_alpha_is_even(alpha: float) -> None:
    labels = np.arange(2000) % 4
    counts = label_counts(labels, dirichlet(alpha)(labels, 10, np.random.default_rng(0)), 4)
    assert np.abs(counts - 50).max() <= 1


def test_dirichlet_goes_from_one_class_to_all() -> None:
    labels = np.arange(20_000) % 10

    def largest_share(alpha: float) -> float:
        counts = label_counts(labels, dirichlet(alpha)(labels, 10, rng()), 10)
        return float((counts.max(axis=0) / counts.sum(axis=0)).mean())

    # A class lies with one client as α → 0, and in tenths as α → ∞.
    assert largest_share(1e-3) > 0.95
    assert 0.2 < largest_share(0.5) < 0.8
    assert largest_share(1e6) < 0.11


def test_dirichlet_proportions_have_the_moments_of_the_distribution() -> None:
    # Dir(α, ..., α) over C: mean 1/C, variance (C - 1) / (C² (Cα + 1)) = 4 / (25 · 3.5) = 0.0457.
    labels = np.repeat(np.arange(2000), 200)
    counts = label_counts(labels, dirichlet(0.5)(labels, 5, rng()), 2000)
    shares = counts / 200
    assert np.allclose(shares.mean(axis=1), 0.2, atol=0.02)
    assert abs(shares.var() - 0.0457) < 0.003


def test_dirichlet_fills_the_needy_from_the_largest() -> None:
    labels = np.zeros(100, np.int64)
    before = sorted(len(part) for part in dirichlet(0.01)(labels, 4, rng()))
    after = sorted(len(part) for part in dirichlet(0.01, min_per_client=10)(labels, 4, rng()))
    assert before[-1] > 90
    assert after == [10, 10, 10, 70]


def test_shards_give_few_classes_in_equal_parts() -> None:
    labels = rng().permutation(np.arange(1000) % 10)
    parts = shards(2)(labels, 25, rng())
    assert {len(part) for part in parts} == {40}
    # 50 shards of 20 tile the classes of 100 exactly, so a shard never spans two classes.
    assert max(len(np.unique(labels[part])) for part in parts) == 2
