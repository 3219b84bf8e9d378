"""Ways to spread examples over clients: `iid`, `k_class`, `dirichlet`, `shards`, `natural`.

Each factory closes over its options and returns a `Partitioner`. Whatever the labels, its parts are
disjoint, together complete, and none is smaller than `min_per_client`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flexmoe_jax.data.apportion import fill
from flexmoe_jax.data.ownership import (
    Holdings,
    deal,
    divide_classes,
    ensure_minimum,
    floors_for_minimum,
    parts_of,
)
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.data import PartitionOptions

# Shares of this concentration are equal to eight digits; the sum of much larger ones overflows.
_EVEN = 1e15

Partitioner = Callable[[np.ndarray, int, np.random.Generator], list[np.ndarray]]
"""(labels (M,) int, C, generator) -> C increasing int64 arrays of positions in `labels`."""


def iid(*, min_per_client: int = 1) -> Partitioner:
    """Every client draws from the same population: a random split into C equal parts (±1)."""

    def partitioner(
        labels: np.ndarray, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        check_clients(num_clients, len(labels), min_per_client)
        owner = np.empty(len(labels), np.int64)
        owner[rng.permutation(len(labels))] = np.arange(len(labels)) % num_clients
        return parts_of(owner, num_clients)

    return partitioner


def k_class(classes_per_client: int, *, min_per_client: int = 1) -> Partitioner:
    """Each client sees exactly `classes_per_client` classes (the "4-class" split of FLEX-MoE).

    Classes are held by equally many clients (±1; fewer where a class has too few examples to give
    each holder one), and a class's examples are split evenly among its holders, unless
    `min_per_client` asks for more in a client whose classes are rare.

    Args:
      classes_per_client: k, from 1 to the number of classes.
      min_per_client: examples.

    Returns:
      The partitioner. It raises InputError where no such split exists.
    """
    PartitionOptions.check(classes_per_client=classes_per_client)

    def partitioner(
        labels: np.ndarray, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        check_clients(num_clients, len(labels), min_per_client)
        present, label, counts = np.unique(labels, return_inverse=True, return_counts=True)
        check_k_class(classes_per_client, num_clients, len(present), len(labels))
        holders = _holders_per_class(counts, num_clients, classes_per_client, rng)
        client, held = _draw_classes(holders, num_clients, classes_per_client, rng)
        floor = np.ones_like(held)
        examples = _divide_evenly(held, counts, floor, rng)
        if np.bincount(client, examples).min() < min_per_client:
            found = floors_for_minimum(Holdings(client, held, examples), min_per_client)
            if found is None:
                raise InputError(
                    "partition.min_per_client",
                    min_per_client,
                    f"the {classes_per_client} classes that a client holds have too few examples "
                    "to share; lower it, or raise partition.classes_per_client",
                )
            examples = _divide_evenly(held, counts, found, rng)
        holdings = Holdings(client, held, examples)
        return parts_of(deal(holdings, label, rng), num_clients)

    return partitioner


def dirichlet(alpha: float, *, min_per_client: int = 1) -> Partitioner:
    """Each class is divided over the clients in proportions drawn from Dir(α, ..., α).

    A small α gives clients few classes and unequal sizes; α → ∞ approaches equal shares of every
    class. The procedure is that of Yurochkin et al. 2019 (arXiv 1905.12022); Hsu et al. 2019
    (arXiv 1909.06335), who draw a class mix for each client, brought the Dirichlet in. Instead of
    drawing again until nobody is below the minimum, examples are moved there from the largest
    clients.

    Args:
      alpha: concentration α, above 0.
      min_per_client: examples.

    Returns:
      The partitioner.
    """
    PartitionOptions.check(alpha=alpha)

    def partitioner(
        labels: np.ndarray, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        check_clients(num_clients, len(labels), min_per_client)
        owner = np.empty(len(labels), np.int64)
        present, label = np.unique(labels, return_inverse=True)
        for rows in parts_of(label, len(present)):
            rows = rng.permutation(rows)
            share = rng.dirichlet(np.full(num_clients, min(alpha, _EVEN)))
            ends = np.rint(np.cumsum(share) * len(rows)).astype(np.int64)
            ends[-1] = len(rows)
            owner[rows] = np.searchsorted(ends, np.arange(len(rows)), side="right")
        return parts_of(ensure_minimum(owner, num_clients, min_per_client, rng), num_clients)

    return partitioner


def shards(shards_per_client: int, *, min_per_client: int = 1) -> Partitioner:
    """Examples sorted by label are cut into equal shards, and each client gets a few at random.

    The pathological non-IID split of McMahan et al. 2017 (arXiv 1602.05629), who give each client
    two shards, so that most see two classes.

    Args:
      shards_per_client: at least 1.
      min_per_client: examples.

    Returns:
      The partitioner.
    """
    PartitionOptions.check(shards_per_client=shards_per_client)

    def partitioner(
        labels: np.ndarray, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        check_clients(num_clients, len(labels), min_per_client)
        check_shards(shards_per_client, num_clients, len(labels))
        shuffled = rng.permutation(len(labels))
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        num_shards = num_clients * shards_per_client
        shard_owner = rng.permutation(np.arange(num_shards) % num_clients)
        owner = np.empty(len(labels), np.int64)
        owner[by_label] = shard_owner[np.arange(len(labels)) * num_shards // len(labels)]
        return parts_of(ensure_minimum(owner, num_clients, min_per_client, rng), num_clients)

    return partitioner


def natural(owner: np.ndarray | None, *, min_per_client: int = 1) -> Partitioner:
    """Each client has the examples that are its own in the data set: a writer's, a hospital's.

    Clients stand in the order of their ids. Nothing is drawn, and no example changes hands.

    Args:
      owner: (M,) int, id of each example's owner; None where the data set does not say.
      min_per_client: examples.

    Returns:
      The partitioner. It raises InputError unless C is the number of owners, or where one has too
      few examples.
    """
    owner = np.zeros(0, np.int64) if owner is None else np.asarray(owner)

    def partitioner(
        labels: np.ndarray, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        ids, client, sizes = np.unique(owner, return_inverse=True, return_counts=True)
        check_natural(len(ids), num_clients)
        check_clients(num_clients, len(labels), min_per_client)
        if owner.shape != labels.shape:
            raise InputError("owner", f"of shape {owner.shape}", f"give {len(labels)}, one a label")
        if sizes.min() < min_per_client:
            raise InputError(
                "partition.min_per_client",
                min_per_client,
                f"client {ids[sizes.argmin()]} has {sizes.min()} examples of its own; lower it to "
                "that, or leave such clients out of the data",
            )
        return parts_of(client, num_clients)

    return partitioner


def check_clients(num_clients: int, num_examples: int, min_per_client: int) -> None:
    """Refuses a number of clients that the examples cannot serve."""
    PartitionOptions.check(min_per_client=min_per_client)
    if num_clients < 1:
        raise InputError("clients.count", num_clients, "give at least 1")
    if num_clients * min_per_client > num_examples:
        raise InputError(
            "clients.count",
            num_clients,
            f"{num_examples} examples serve at most {num_examples // min_per_client} clients with "
            f"partition.min_per_client={min_per_client}",
        )


def check_k_class(
    classes_per_client: int, num_clients: int, num_classes: int, num_examples: int
) -> None:
    """Refuses a `k_class` partition that cannot exist."""
    field, slots = "partition.classes_per_client", num_clients * classes_per_client
    if classes_per_client > num_classes:
        raise InputError(field, classes_per_client, f"there are {num_classes} classes")
    if slots < num_classes:
        raise InputError(
            field,
            classes_per_client,
            f"{num_clients} clients would leave some of the {num_classes} classes to nobody; give "
            f"at least {-(-num_classes // num_clients)}, or more clients",
        )
    if slots > num_examples:
        raise InputError(
            field,
            classes_per_client,
            f"{num_examples} examples cannot give {num_clients} clients one of each class; give at "
            f"most {num_examples // num_clients}, or fewer clients",
        )


def check_shards(shards_per_client: int, num_clients: int, num_examples: int) -> None:
    """Refuses shards without examples."""
    if num_clients * shards_per_client > num_examples:
        raise InputError(
            "partition.shards_per_client",
            shards_per_client,
            f"{num_examples} examples make at most {num_examples // num_clients} shards for each "
            f"of {num_clients} clients",
        )


def check_natural(num_owners: int, num_clients: int) -> None:
    """Refuses a number of clients that is not that of the examples' owners."""
    if not num_owners:
        remedy = "the data set does not say who owns its examples (train_clients); choose another"
        raise InputError("partition.name", "natural", remedy)
    if num_clients != num_owners:
        remedy = f"the training examples have {num_owners} owners; set it to {num_owners}"
        raise InputError("clients.count", num_clients, remedy)


def _holders_per_class(
    counts: np.ndarray, num_clients: int, classes_per_client: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns how many clients hold each class, (Y,): even, but none above its example count."""
    slots = num_clients * classes_per_client
    limit = np.minimum(counts, num_clients)
    if limit.sum() < slots:
        raise InputError(
            "partition.classes_per_client",
            classes_per_client,
            f"the rare classes have too few examples for {num_clients} clients; give fewer classes "
            "or fewer clients",
        )
    return fill(limit, slots, rng)


def _draw_classes(
    holders: np.ndarray, num_clients: int, classes_per_client: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws each client's classes, so that class y goes to `holders[y]` clients.

    Client after client takes the classes with most holders still to find, ties at random. Then no
    class is ever left with more holders to find than there are clients to come, so everyone gets
    `classes_per_client` different ones (Gale–Ryser).

    Returns:
      client (C·k,) and class (C·k,) of each pair, sorted by client.
    """
    left = holders.astype(np.float64)
    drawn = np.empty((num_clients, classes_per_client), np.int64)
    for client in rng.permutation(num_clients):
        wanted = left + rng.random(len(left))
        taken = np.argpartition(-wanted, classes_per_client - 1)[:classes_per_client]
        left[taken] -= 1
        drawn[client] = np.sort(taken)
    return np.repeat(np.arange(num_clients), classes_per_client), drawn.ravel()


def _divide_evenly(
    held: np.ndarray, counts: np.ndarray, floor: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Divides each class evenly among its pairs, with the remainders to random ones, (pairs,)."""
    order = rng.permutation(len(held))
    examples = np.empty(len(held), np.int64)
    examples[order] = divide_classes(held[order], counts, np.ones(len(held)), floor[order])
    return examples
