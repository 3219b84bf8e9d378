from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexmoe_jax.data import PARTITIONS, Partitioner, skewed
from flexmoe_jax.data.clients import label_counts
from flexmoe_jax.errors import InputError
from tests.data.conftest import check, partition


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments that `check` accepts, mostly with unequal classes."""
    num_classes = draw(st.integers(1, 8))
    counts = draw(st.lists(st.integers(1, 60), min_size=num_classes, max_size=num_classes))
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(num_classes) * 3, counts))
    num_clients = draw(st.integers(1, min(30, len(labels))))
    return {
        "name": draw(st.sampled_from(sorted(PARTITIONS))),
        "labels": labels,
        "num_clients": num_clients,
        "seed": draw(st.integers(0, 2**31)),
        "classes_per_client": draw(st.integers(1, num_classes)),
        "alpha": draw(st.sampled_from([1e-9, 0.05, 0.5, 10.0, 1e6])),
        "shards_per_client": draw(st.integers(1, 3)),
        "quantity_skew": draw(st.sampled_from([0.0, 0.5, 2.0, 50.0])),
        "min_per_client": draw(st.integers(1, 6)),
        "owner": np.arange(len(labels)) % num_clients * 7 - 3,
    }


@settings(max_examples=300, deadline=None)
@given(requests())
def test_parts_are_disjoint_complete_sorted_and_large_enough(request: dict[str, Any]) -> None:
    try:
        parts = partition(**request)
    except InputError:
        assume(False)
    labels, num_clients = request["labels"], request["num_clients"]
    assert len(parts) == num_clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert min(len(part) for part in parts) >= request["min_per_client"]
    again = partition(**request)
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))
    if request["name"] == "k_class":
        k = request["classes_per_client"]
        assert all(len(np.unique(labels[part])) == k for part in parts)


@settings(max_examples=150, deadline=None)
@given(requests())
def test_skew_keeps_every_clients_classes(request: dict[str, Any]) -> None:
    try:
        parts = partition(**{**request, "quantity_skew": 0.0})
    except InputError:
        assume(False)
    labels = np.unique(request["labels"], return_inverse=True)[1]

    def as_before(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> Any:
        return list(parts)

    again = skewed(as_before, 2.0, min_per_client=request["min_per_client"])
    after = again(labels, len(parts), np.random.default_rng(request["seed"]))
    num_classes = labels.max() + 1
    before_counts = label_counts(labels, parts, num_classes)
    after_counts = label_counts(labels, after, num_classes)
    assert np.array_equal(before_counts > 0, after_counts > 0)
    assert min(len(part) for part in after) >= request["min_per_client"]


def test_skew_spreads_sizes_log_normally() -> None:
    labels = np.zeros(200_000, np.int64)
    parts = partition("iid", labels, 1000, seed=0, quantity_skew=0.5)
    spread = np.log([len(part) for part in parts]).std()
    # The standard error of the deviation of 1,000 normal numbers is 0.5 / sqrt(2000) = 0.011.
    assert abs(spread - 0.5) < 0.05


@pytest.mark.parametrize("name", sorted(PARTITIONS.keys() - {"natural"}))
@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_seeds_differ(name: str, skew: float) -> None:
    labels = np.random.default_rng(0).integers(0, 10, 500)
    one, two = (
        partition(name, labels, 10, seed=seed, classes_per_client=2, quantity_skew=skew)
        for seed in (0, 1)
    )
    assert not all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("dirichlet", {"alpha": 0.0}, "partition.alpha"),
        ("dirichlet", {"alpha": -1.0}, "partition.alpha"),
        ("dirichlet", {"alpha": float("nan")}, "partition.alpha"),
        ("dirichlet", {"alpha": float("inf")}, "partition.alpha"),
        ("k_class", {"classes_per_client": 0}, "partition.classes_per_client"),
        ("k_class", {"classes_per_client": 11}, "partition.classes_per_client"),
        # 4 clients with 2 classes each see at most 8 of the 10.
        ("k_class", {"classes_per_client": 2, "num_clients": 4}, "partition.classes_per_client"),
        # 60 clients with 2 classes each need 120 of the 100 examples.
        ("k_class", {"classes_per_client": 2, "num_clients": 60}, "partition.classes_per_client"),
        ("shards", {"shards_per_client": 0}, "partition.shards_per_client"),
        ("shards", {"shards_per_client": 6, "num_clients": 20}, "partition.shards_per_client"),
        ("iid", {"quantity_skew": -0.1}, "partition.quantity_skew"),
        ("iid", {"quantity_skew": float("nan")}, "partition.quantity_skew"),
        ("iid", {"min_per_client": 0}, "partition.min_per_client"),
        ("iid", {"num_clients": 0}, "clients.count"),
        ("iid", {"num_clients": 101}, "clients.count"),
        ("iid", {"num_clients": 20, "min_per_client": 6}, "clients.count"),
        ("k-class", {}, "partition.name"),
        ("zzz", {}, "partition.name"),
    ],
)
def test_bad_input_is_refused_alike_with_and_without_labels(
    name: str, options: dict[str, Any], field: str
) -> None:
    options = {"num_clients": 10, **options}
    with pytest.raises(InputError) as early:
        check(name, num_classes=10, num_examples=100, **options)
    with pytest.raises(InputError) as late:
        partition(name, np.arange(100) % 10, seed=0, **options)
    assert early.value.field == late.value.field == field
    assert str(early.value) == str(late.value)
    assert "\n" not in str(early.value)


def test_an_unknown_name_gets_the_nearest_and_the_list() -> None:
    with pytest.raises(InputError, match=r"did you mean dirichlet\? .*iid, k_class, dirichlet"):
        check("dirichelet", num_clients=2, num_classes=2, num_examples=9)


def test_options_of_other_partitions_are_not_looked_at() -> None:
    check("iid", num_clients=2, num_classes=3, num_examples=9, alpha=-1.0, classes_per_client=99)


OWNERS = np.array([40, -7, 40, 3, -7, 40])


def test_natural_clients_keep_their_own_in_the_order_of_their_ids() -> None:
    for seed in (0, 1):
        parts = partition("natural", np.arange(6) % 2, 3, seed=seed, owner=OWNERS)
        assert [part.tolist() for part in parts] == [[1, 4], [3], [0, 2, 5]]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"owner": None}, "partition.name=natural: the data set does not say"),
        ({"num_clients": 20}, "clients.count=20: .* 3 owners; set it to 3"),
        ({"num_clients": 2}, "clients.count=2: .* 3 owners; set it to 3"),
        ({"min_per_client": 2}, "partition.min_per_client=2: client 3 has 1 examples"),
        ({"owner": np.arange(3)}, r"owner=of shape \(3,\): give 6"),
    ],
)
def test_natural_clients_that_do_not_fit_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=f"^{line}"):
        partition(
            "natural", np.zeros(6, int), **{"num_clients": 3, "seed": 0, "owner": OWNERS} | options
        )


def test_natural_clients_are_counted_before_there_are_labels() -> None:
    sizes = {"num_classes": 2, "num_examples": 6}
    check("natural", num_clients=3, num_owners=3, **sizes)
    with pytest.raises(InputError, match="set it to 3"):
        check("natural", num_clients=4, num_owners=3, **sizes)


def test_the_registry_takes_a_new_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    def halves(*, alpha: float) -> Partitioner:
        def partitioner(
            labels: np.ndarray, num_clients: int, rng: np.random.Generator
        ) -> list[np.ndarray]:
            cut = int(alpha * len(labels))
            return [np.arange(cut), np.arange(cut, len(labels))]

        return partitioner

    monkeypatch.setitem(PARTITIONS, "halves", halves)
    parts = partition("halves", np.zeros(4, np.int64), 2, seed=0, alpha=0.25)
    assert [part.tolist() for part in parts] == [[0], [1, 2, 3]]


def test_natural_clients_keep_what_they_own():
    sizes = {"num_clients": 2, "num_classes": 2, "num_examples": 9, "num_owners": 2}
    check("natural", **sizes)
    with pytest.raises(InputError, match=r"partition\.quantity_skew=0\.5: natural clients keep"):
        check("natural", quantity_skew=0.5, **sizes)
