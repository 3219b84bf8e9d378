"""Who owns which example: moving and dealing out examples between clients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexmoe_jax.data.apportion import apportion, fill


class Holdings(NamedTuple):
    """How many examples of which class clients hold; only pairs that occur, sorted by client.

    Attributes:
      client: (pairs,) int in [0, C).
      label: (pairs,) int in [0, Y).
      examples: (pairs,) int, at least 1.
    """

    client: np.ndarray
    label: np.ndarray
    examples: np.ndarray


def parts_of(owner: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """Returns each client's examples, increasing, given each example's owner (M,)."""
    by_owner = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=num_clients))
    starts = np.concatenate([[0], ends[:-1]])
    return [by_owner[start:end] for start, end in zip(starts, ends, strict=True)]


def holdings_of(parts: list[np.ndarray], label: np.ndarray, num_classes: int) -> Holdings:
    """Counts what clients hold of each class, from labels (M,) in [0, Y)."""
    client = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    cell, count = np.unique(client * num_classes + label[np.concatenate(parts)], return_counts=True)
    return Holdings(cell // num_classes, cell % num_classes, count)


def deal(holdings: Holdings, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hands out the examples, drawn at random within each class.

    Args:
      holdings: whose counts of each class add up to that class's examples.
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
    """Moves examples from the largest clients to those below the minimum.

    The largest clients are cut down to one common size (±1), no lower than the minimum and no
    lower than what fills the needy ones; which examples they give up is drawn by `rng`.

    Args:
      owner: (M,) int, each example's owner.
      num_clients: C, with C · minimum ≤ M.
      minimum: examples.
      rng: picks the examples.

    Returns:
      (M,) the new owners; the old ones, without a draw, when nobody is below the minimum.
    """
    size = np.bincount(owner, minlength=num_clients)
    need = np.maximum(minimum - size, 0)
    if not need.any():
        return owner
    excess = np.maximum(size - minimum, 0)
    # What everyone keeps of the excess is `min(excess, level)`: the largest are cut to one size.
    give = excess - fill(excess, int(excess.sum() - need.sum()), rng)
    shuffled = rng.permutation(len(owner))
    by_owner = shuffled[np.argsort(owner[shuffled], kind="stable")]
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(size) - size, size)
    moved = by_owner[rank < give[owner[by_owner]]]
    owner = owner.copy()
    owner[rng.permutation(moved)] = np.repeat(np.arange(num_clients), need)
    return owner


def floors_for_minimum(holdings: Holdings, minimum: int) -> np.ndarray | None:
    """Finds how much each pair must at least get, for every client to reach the minimum.

    A maximum flow from the clients (which need `minimum` examples) through the pairs to the classes
    (which have only so many) finds such floors whenever they exist.

    Args:
      holdings: the pairs that may hold examples, each at least one; their counts of a class add up
        to that class's examples.
      minimum: examples of each client.

    Returns:
      (pairs,) int64, each at least 1, summing to the minimum or more in each client and to no more
      than its examples in each class; None when there are no such floors.
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
    """Divides each class among the pairs that hold it.

    Args:
      label: (pairs,) int in [0, Y).
      total: (Y,) int, examples of each class.
      weight: (pairs,) above 0, in proportion to which a class is divided.
      floor: (pairs,) int, what each pair gets at least.

    Returns:
      (pairs,) int64, examples of each pair.
    """
    examples = np.empty(len(label), np.int64)
    for y, pairs in enumerate(parts_of(label, len(total))):
        examples[pairs] = apportion(int(total[y]), weight[pairs], floor[pairs])
    return examples


def reweigh(holdings: Holdings, weight: np.ndarray, minimum: int) -> Holdings:
    """Divides each class anew among its holders, in proportion to `examples · weight`.

    Args:
      holdings: what the C clients hold; each at least `minimum` examples in all.
      weight: (C,) above 0.
      minimum: examples that each client keeps in all.

    Returns:
      The same pairs with other counts, each at least 1; each class has as many examples as before.
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
            # In proportion to what the client held, which is enough: no floor exceeds that, so the
            # floors fit into every class, and this client is never short again.
            floor[start:end] = apportion(minimum, before[start:end], floor[start:end])
