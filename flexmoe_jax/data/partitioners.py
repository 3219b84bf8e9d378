"""Partitioners of examples over clients: `iid`, `k_class`, `dirichlet`, `shards`, `natural`.

Each factory takes the options and returns a `Partitioner`. For any labels, its parts are disjoint,
cover all examples, and have at least `min_per_client` examples each.
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

# At this concentration the shares agree to eight digits. The sum of much larger values overflows.
_EVEN = 1e15

Partitioner = Callable[[np.ndarray, int, np.random.Generator], list[np.ndarray]]
"""(labels (M,) int, C, generator) -> C increasing int64 arrays of positions in `labels`."""


def iid(*, min_per_client: int = 1) -> Partitioner:
    """Split the examples at random into C equal parts (±1), all from the same distribution."""

    def partitioner(
        labels: np.ndarray, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        check_clients(num_clients, len(labels), min_per_client)
        owner = np.empty(len(labels), np.int64)
        owner[rng.permutation(len(labels))] = np.arange(len(labels)) % num_clients
        return parts_of(owner, num_clients)

    return partitioner


def k_class(classes_per_client: int, *, min_per_client: int = 1) -> Partitioner:
    """Give each client exactly `classes_per_client` classes (the "4-class" split of FLEX-MoE).

    Each class goes to equally many clients (±1; fewer if the class does not have one example for
    each of them). The examples of a class are split evenly among its clients, unless a client with
    rare classes needs more to reach `min_per_client`.

    Args:
      classes_per_client: k, from 1 to the number of classes.
      min_per_client: examples.

    Returns:
      The partitioner. It raises InputError if no such split exists.
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
    """Divide each class over the clients in proportions drawn from Dir(α, ..., α).

    A small α gives clients few classes and unequal sizes; α → ∞ approaches equal shares of every
    class. The procedure follows Yurochkin et al. 2019 (arXiv 1905.12022). Hsu et al. 2019
    (arXiv 1909.06335) introduced the Dirichlet distribution, but draw a class mix for each client.
    If clients are below the minimum, the draw is not repeated. Instead, they get examples from the
    largest clients.

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
    """Sort examples by label, cut them into equal shards, and give each client a few at random.

    This is the pathological non-IID split of McMahan et al. 2017 (arXiv 1602.05629). They give each
    client two shards, so that most clients have two classes.

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
    """Give each client the examples that it owns in the data set, as a writer or a hospital does.

    Clients are numbered by sorted id. Nothing is drawn at random, and no example moves.

    Args:
      owner: (M,) int, id of each example's owner; None if the data set does not say.
      min_per_client: examples.

    Returns:
      The partitioner. It raises InputError if C is not the number of owners, or an owner has too
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
    """Check that there are enough examples for the number of clients."""
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
    """Check that a `k_class` partition of these sizes can exist."""
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
    """Check that every shard gets an example."""
    if num_clients * shards_per_client > num_examples:
        raise InputError(
            "partition.shards_per_client",
            shards_per_client,
            f"{num_examples} examples make at most {num_examples // num_clients} shards for each "
            f"of {num_clients} clients",
        )


def check_natural(num_owners: int, num_clients: int) -> None:
    """Check that the number of clients equals the number of owners of the examples."""
    if not num_owners:
        remedy = "the data set does not say who owns its examples (train_clients); choose another"
        raise InputError("partition.name", "natural", remedy)
    if num_clients != num_owners:
        remedy = f"the training examples have {num_owners} owners; set it to {num_owners}"
        raise InputError("clients.count", num_clients, remedy)


def _holders_per_class(
    counts: np.ndarray, num_clients: int, classes_per_client: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the number of clients of each class, (Y,): even, but at most its example count."""
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
    """Draw each client's classes, so that class y goes to `holders[y]` clients.

    The clients, one after the other, take the classes that still need most clients; ties are
    random. So no class ever needs more clients than are left, and every client gets
    `classes_per_client` different classes (Gale–Ryser).

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
    """Divide each class evenly among its pairs, (pairs,); remainders go to random pairs."""
    order = rng.permutation(len(held))
    examples = np.empty(len(held), np.int64)
    examples[order] = divide_classes(held[order], counts, np.ones(len(held)), floor[order])
    return examples
