"""Divide a data set among clients by a named partition, and check options without the data."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from flexmoe_jax.data.ownership import deal, holdings_of, parts_of, reweigh
from flexmoe_jax.data.partitioners import (
    Partitioner,
    check_clients,
    check_k_class,
    check_natural,
    check_shards,
    dirichlet,
    iid,
    k_class,
    natural,
    shards,
)
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.data import PartitionOptions

PARTITIONS: dict[str, Callable[..., Partitioner]] = {
    "iid": iid,
    "k_class": k_class,
    "dirichlet": dirichlet,
    "shards": shards,
    "natural": natural,
}
"""Partitioner factories by the value of `partition.name`. The parameters of a factory name the
fields of `PartitionOptions` that it uses; a factory may also take `owner`."""


def partition(
    options: PartitionOptions,
    labels: np.ndarray,
    num_clients: int,
    *,
    seed: int,
    owner: np.ndarray | None = None,
) -> tuple[np.ndarray, ...]:
    """Assign every example to exactly one client.

    Args:
      options: the name, one of `PARTITIONS`, and the options of that partition.
      labels: (M,) int.
      num_clients: C.
      seed: the same seed gives the same parts.
      owner: (M,) int, id of each example's owner in the data set; used by `natural`.

    Returns:
      For each of the C clients, the positions of its examples in `labels`: int64, increasing.

    Raises:
      InputError: in all cases in which `check` raises it, or if rare classes have too few examples
        for the partition.
    """
    labels = np.asarray(labels)
    check(
        options,
        num_clients=num_clients,
        num_classes=len(np.unique(labels)),
        num_examples=len(labels),
        num_owners=0 if owner is None else len(np.unique(owner)),
    )
    partitioner, least = _make(options, owner), options.min_per_client
    if options.quantity_skew > 0:
        partitioner = skewed(partitioner, options.quantity_skew, min_per_client=least)
    return tuple(partitioner(labels, num_clients, np.random.default_rng([seed, 0])))


def check(
    options: PartitionOptions,
    *,
    num_clients: int,
    num_classes: int,
    num_examples: int,
    num_owners: int = 0,
) -> None:
    """Check the options of a partition, knowing only the sizes of the data set.

    Options that the named partition does not use are not checked.

    Args:
      options: as for `partition`.
      num_clients: C.
      num_classes: Y.
      num_examples: M.
      num_owners: number of clients that own the examples in the data set, 0 if the data set does
        not say; used by `natural`.

    Raises:
      InputError: if `partition` would reject the options; names the field, value and remedy.
    """
    _make(options)
    if options.name == "natural":
        check_natural(num_owners, num_clients)
        if options.quantity_skew:
            remedy = "natural clients keep what they own; set it to 0"
            raise InputError("partition.quantity_skew", options.quantity_skew, remedy)
    check_clients(num_clients, num_examples, options.min_per_client)
    if options.name == "k_class":
        check_k_class(options.classes_per_client, num_clients, num_classes, num_examples)
    if options.name == "shards":
        check_shards(options.shards_per_client, num_clients, num_examples)


def skewed(
    partitioner: Partitioner, quantity_skew: float, *, min_per_client: int = 1
) -> Partitioner:
    """Make client sizes unequal, without changing which classes each client has.

    Each client draws a factor w_c = exp(q z_c), z_c ~ N(0, 1), log-normal with spread q. Let n_cy
    be the number of examples of class y on client c. Each class is divided again among the clients
    that have it, in proportion to n_cy · w_c, at least one example each. If all clients had the
    same size before, the log of a client's size then has a standard deviation of about q. At q = 1
    the sizes of the middle two thirds of the clients span a factor of e² ≈ 7. No client falls below
    `min_per_client`, which limits the spread.

    Args:
      partitioner: its parts must hold at least `min_per_client` examples each.
      quantity_skew: q, at least 0.
      min_per_client: examples.

    Returns:
      The skewed partitioner.
    """
    PartitionOptions.check(quantity_skew=quantity_skew)

    def partitioner_with_skew(
        labels: np.ndarray, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        parts = partitioner(labels, num_clients, rng)
        present, label = np.unique(labels, return_inverse=True)
        before = holdings_of(parts, label, len(present))
        z = rng.standard_normal(num_clients)
        # Only ratios of the factors matter. The largest is 1, and none underflows even for large q.
        weight = np.exp(np.maximum(quantity_skew * (z - z.max()), -400.0))
        after = reweigh(before, weight, min_per_client)
        return parts_of(deal(after, label, rng), num_clients)

    return partitioner_with_skew


def _make(options: PartitionOptions, owner: np.ndarray | None = None) -> Partitioner:
    """Call the named factory with the options that it takes."""
    if options.name not in PARTITIONS:
        near = difflib.get_close_matches(options.name, PARTITIONS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        remedy = f"{hint}choose one of {', '.join(PARTITIONS)}"
        raise InputError("partition.name", options.name, remedy)
    factory, given = PARTITIONS[options.name], {**asdict(options), "owner": owner}
    taken = inspect.signature(factory).parameters
    return factory(**{option: value for option, value in given.items() if option in taken})
