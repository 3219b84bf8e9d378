"""Assign examples to clients, and move examples between clients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexmoe_jax.data.apportion import apportion, fill


class Holdings(NamedTuple):
    """Numbers of examples for each (client, class) pair that occurs, sorted by client.

    Attributes:
      client: (pairs,) int in [0, C).
      label: (pairs,) int in [0, Y).
      examples: (pairs,) int, at least 1.
    """

    client: np.ndarray
    label: np.ndarray
    examples: np.ndarray


def parts_of(owner: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """Return each client's examples, increasing, given each example's owner (M,)."""
    by_owner = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=num_clients))
    starts = np.concatenate([[0], ends[:-1]])
    return [by_owner[start:end] for start, end in zip(starts, ends, strict=True)]


def holdings_of(parts: list[np.ndarray], label: np.ndarray, num_classes: int) -> Holdings:
    """Count the clients' examples of each class, from labels (M,) in [0, Y)."""
    client = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    cell, count = np.unique(client * num_classes + label[np.concatenate(parts)], return_counts=True)
    return Holdings(cell // num_classes, cell % num_classes, count)


def deal(holdings: Holdings, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Assign examples to clients, drawn at random within each class.

    Args:
      holdings: the counts of each class add up to the number of its examples.
      label: (M,) int in [0, Y).
      rng: shuffles each class.

    Returns:
      (M,) int64, each example's owner.
    """
    shuffled = rng.permutation(len(label))
    by_label = shuffled[np.argsort(label[shuffled], kind="stable")]
    order = np.argsort(holdings.label, kind="stable")
    owner = np.empty(len(label), np.int64)
    owner[by_label] = np.repeat(holdings.client[order], holdings.examples[order])
    return owner


def ensure_minimum(
    owner: np.ndarray, num_clients: int, minimum: int, rng: np.random.Generator
) -> np.ndarray:
    """Move examples from the largest clients to the clients below the minimum.

    The largest clients are reduced to one common size (±1). This size is at least the minimum, and
    only as small as necessary. `rng` draws the examples that they give up.

    Args:
      owner: (M,) int, each example's owner.
      num_clients: C, with C · minimum ≤ M.
      minimum: examples.
      rng: draws the examples.

    Returns:
      (M,) the new owners. If no client is below the minimum, the old owners, and `rng` is not used.
    """
    size = np.bincount(owner, minlength=num_clients)
    need = np.maximum(minimum - size, 0)
    if not need.any():
        return owner
    excess = np.maximum(size - minimum, 0)
    # Each client keeps `min(excess, level)` of its excess: the largest are reduced to one size.
    give = excess - fill(excess, int(excess.sum() - need.sum()), rng)
    shuffled = rng.permutation(len(owner))
    by_owner = shuffled[np.argsort(owner[shuffled], kind="stable")]
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(size) - size, size)
    moved = by_owner[rank < give[owner[by_owner]]]
    owner = owner.copy()
    owner[rng.permutation(moved)] = np.repeat(np.arange(num_clients), need)
    return owner


def floors_for_minimum(holdings: Holdings, minimum: int) -> np.ndarray | None:
    """Find a lower bound for each pair such that every client reaches the minimum.

    The bounds come from a maximum flow from the clients, which need `minimum` examples, through the
    pairs to the classes, which have limited numbers of examples. It finds bounds if any exist.

    Args:
      holdings: the pairs that may hold examples, each at least one; the counts of each class add
        up to the number of its examples.
      minimum: examples of each client.

    Returns:
      (pairs,) int64, each at least 1. They sum to the minimum or more for each client, and to at
      most the number of its examples for each class. None if there are no such bounds.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    pairs_of_client, pairs_of_class = np.bincount(holdings.client), np.bincount(holdings.label)
    num_clients, num_classes = len(pairs_of_client), len(pairs_of_class)
    examples = np.bincount(holdings.label, holdings.examples).astype(np.int64)
    need = np.maximum(minimum - pairs_of_client, 0)
    # Node 0 is the source, then clients, then classes, then the sink.
    clients, classes = 1 + np.arange(num_clients), 1 + num_clients + np.arange(num_classes)
    sink = 1 + num_clients + num_classes
    tail = np.concatenate([np.zeros(num_clients, np.int64), clients[holdings.client], classes])
    head = np.concatenate([clients, classes[holdings.label], np.full(num_classes, sink)])
    room = np.concatenate([need, need[holdings.client], examples - pairs_of_class])
    graph = csr_array((room.astype(np.int32), (tail, head)), shape=(sink + 1, sink + 1))
    flow = maximum_flow(graph, 0, sink)
    if flow.flow_value < need.sum():
        return None
    through = flow.flow[clients[holdings.client], classes[holdings.label]]
    return 1 + np.asarray(through, np.int64).ravel()


def divide_classes(
    label: np.ndarray, total: np.ndarray, weight: np.ndarray, floor: np.ndarray
) -> np.ndarray:
    """Divide the examples of each class among its pairs.

    Args:
      label: (pairs,) int in [0, Y).
      total: (Y,) int, examples of each class.
      weight: (pairs,) above 0; a class is divided in proportion to the weights.
      floor: (pairs,) int, the least number of examples of each pair.

    Returns:
      (pairs,) int64, examples of each pair.
    """
    examples = np.empty(len(label), np.int64)
    for y, pairs in enumerate(parts_of(label, len(total))):
        examples[pairs] = apportion(int(total[y]), weight[pairs], floor[pairs])
    return examples


def reweigh(holdings: Holdings, weight: np.ndarray, minimum: int) -> Holdings:
    """Divide each class again among the clients that have it, in proportion to `examples · weight`.

    Args:
      holdings: of the C clients; each client has at least `minimum` examples in total.
      weight: (C,) above 0.
      minimum: examples that each client keeps in total.

    Returns:
      The same pairs with new counts, each at least 1; the class totals do not change.
    """
    client, label, before = holdings
    total = np.bincount(label, before).astype(np.int64)
    floor = np.ones_like(before)
    starts = np.flatnonzero(np.diff(client, prepend=-1))
    ends = np.append(starts[1:], len(client))
    while True:
        after = divide_classes(label, total, before * weight[client], floor)
        short = np.flatnonzero(np.bincount(client, after) < minimum)
        if not short.size:
            return holdings._replace(examples=after)
        for start, end in zip(starts[short], ends[short], strict=True):
            # The new floors are proportional to the client's former counts and never exceed them.
            # So the floors fit into every class, and this client is never short again.
            floor[start:end] = apportion(minimum, before[start:end], floor[start:end])
