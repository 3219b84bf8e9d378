"""Rules of clients: which client follows which rule, and how a rule changes the examples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax import data
from flexmoe_jax.data.rules import RULES, deal_rules, relabel, turn
from flexmoe_jax.errors import InputError


def dataset(classes: int = 5, side: tuple[int, int] = (3, 3)) -> data.Dataset:
    rng = np.random.default_rng(0)
    labels = np.arange(40 * classes) % classes
    return data.Dataset(
        name="some",
        train_images=rng.integers(256, size=(len(labels), *side, 1), dtype=np.uint8),
        train_labels=labels.astype(np.int32),
        test_images=rng.integers(256, size=(8 * classes, *side, 1), dtype=np.uint8),
        test_labels=(np.arange(8 * classes) % classes).astype(np.int32),
        classes=tuple("abcdefgh"[:classes]),
    )


def options(rules: str, per_client: int = 1, name: str = "iid") -> data.PartitionOptions:
    return data.PartitionOptions(name=name, rule=rules, rules_per_client=per_client)


def test_a_picture_is_turned_by_hand():
    # Counter-clockwise, as NumPy has it.
    picture = np.array([[[1, 2], [3, 4]]] * 4, np.uint8)[..., None]
    turned = turn(picture, np.array([0, 1, 2, 3]))[..., 0]
    assert turned.tolist() == [
        [[1, 2], [3, 4]],
        [[2, 4], [1, 3]],
        [[4, 3], [2, 1]],
        [[3, 1], [4, 2]],
    ]


def test_labels_move_along_the_order_by_hand():
    order = np.array([2, 0, 1, 3])  # 2 -> 0 -> 1 -> 3 -> 2
    assert relabel(np.array([2, 0, 3, 1]), np.array([0, 1, 1, 3]), order).tolist() == [2, 1, 2, 0]


@settings(max_examples=30, deadline=None)
@given(clients=st.integers(1, 30), per=st.integers(1, RULES), seed=st.integers(0, 2**31))
def test_rules_are_followed_by_as_many_clients_up_to_one(clients, per, seed):
    dealt = deal_rules(clients, per, np.random.default_rng(seed))
    count = np.bincount(dealt.ravel(), minlength=RULES)
    assert count.max() - count.min() <= 1
    assert all(len(set(row)) == per for row in dealt)


@pytest.mark.parametrize("rules", ["turned", "relabelled"])
@pytest.mark.parametrize("per_client", [1, 2])
def test_examples_follow_their_clients_rules(rules, per_client):
    before, parts = dataset(), np.split(np.arange(200), 8)
    ruled = data.follow_rules(options(rules, per_client), before, parts, seed=3)
    after = ruled.dataset
    rule, label = np.divmod(ruled.group, 5)
    assert (label == after.test_labels).all()
    # Two of the eight test examples of a class follow each rule.
    kinds = np.stack([before.test_labels, rule])
    assert (np.unique(kinds, axis=1, return_counts=True)[1] == 2).all()
    for own, part in zip(ruled.owns, parts, strict=True):
        groups = own.reshape(RULES, 5)
        assert groups.any(axis=1).sum() == per_client
        followed = np.flatnonzero(groups.any(axis=1))
        if rules == "turned":
            as_told = [np.rot90(before.train_images[part], r, axes=(1, 2)) for r in followed]
            same = [(x == after.train_images[part]).all(axis=(1, 2, 3)) for x in as_told]
            assert np.any(same, axis=0).all()
            counts = np.sum(same, axis=1)
            assert counts.max() - counts.min() <= 1
            assert (after.train_labels == before.train_labels).all()
        else:
            moved = np.stack([before.train_labels[part], after.train_labels[part]])
            assert len(np.unique(moved, axis=1).T) <= 5 * per_client
            assert (after.train_images == before.train_images).all()
        assert set(after.train_labels[part]) <= set(np.flatnonzero(groups.any(axis=0)))
    assert ruled.ceiling == (1 if rules == "turned" else 0.25)
    again = data.follow_rules(options(rules, per_client), before, parts, seed=3)
    assert (again.group == ruled.group).all()
    assert (again.dataset.train_images == after.train_images).all()


@pytest.mark.parametrize(
    ("rules", "name", "given_data", "said"),
    [
        ("turned", "iid", dataset(side=(2, 3)), "no square pictures"),
        ("relabelled", "iid", dataset(classes=3), "4 rules need as many classes"),
        ("turned", "natural", dataset(), "natural clients"),
    ],
)
def test_what_has_no_rules_is_refused(rules, name, given_data, said):
    parts = [np.arange(len(given_data.train_labels))]
    with pytest.raises(InputError, match=f"partition.rule={rules}.*{said}"):
        data.follow_rules(options(rules, name=name), given_data, parts, seed=0)


def test_few_test_examples_are_dealt_evenly_too():
    before = dataset()
    few = replace(
        before,
        test_images=before.test_images[:10],
        test_labels=np.arange(10, dtype=np.int32) % 5,
    )
    ruled = data.follow_rules(options("turned"), few, np.split(np.arange(200), 8), seed=0)
    count = np.bincount(ruled.group // 5, minlength=RULES)
    assert count.max() - count.min() <= 1
