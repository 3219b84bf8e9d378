"""Orders of clients and experts that make the structure of the matrices visible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.reporting.run_files import Numbers
from experiments.reporting.runs import Floats, Run


@dataclass(frozen=True)
class Order:
    """Order of the columns and rows in the client pictures of one run.

    Attributes:
      clients: (C,) client numbers from left to right, grouped by their most frequent label.
      groups: (C,) index of that label, in the same order; None if labels are not recorded.
      experts: (E,) expert numbers from top to bottom, by the mean position of their clients.
    """

    clients: NDArray[np.intp]
    groups: NDArray[np.intp] | None
    experts: NDArray[np.intp]


def order_of(run: Run) -> Order | None:
    """Returns the order for one run; None if arrays.npz has no data on clients."""
    matrices = [
        run.arrays[n] for n in ("usage", "held_rounds", "holds", "fitness") if n in run.arrays
    ]
    counts = run.arrays.get("label_counts")
    sized = [a for a in (counts, run.arrays.get("capacity"), *matrices) if a is not None]
    if not sized or not len(sized[0]):
        return None
    clients = np.arange(len(sized[0]))
    groups = None
    if counts is not None and counts.shape[1]:
        clients = by_label(counts)
        groups = counts.argmax(axis=1)[clients]
    experts = by_clients(matrices[0], clients) if matrices else np.arange(0)
    return Order(clients, groups, experts)


def by_label(counts: Numbers) -> NDArray[np.intp]:
    """Sorts clients by their most frequent label, the one with the largest share of it first.

    Args:
      counts: (C, Y) label counts.

    Returns:
      (C,) client numbers.
    """
    share = shares(counts)
    return np.lexsort((-share.max(axis=1), counts.argmax(axis=1)))


def by_clients(weight: Numbers, clients: NDArray[np.intp]) -> NDArray[np.intp]:
    """Sorts experts by the weighted mean position of their clients; idle experts last.

    Args:
      weight: (C, E) weight of each client for each expert, by client number.
      clients: (C,) client numbers from left to right.

    Returns:
      (E,) expert numbers.
    """
    weight = np.nan_to_num(weight[clients].astype(float))
    total = weight.sum(axis=0)
    places = np.arange(len(clients)) @ weight
    mean = np.divide(places, total, out=np.full(len(total), np.inf), where=total > 0)
    return np.argsort(mean, kind="stable")


def shares(rows: Numbers) -> Floats:
    """Divides each row by its sum; rows that sum to 0 become NaN."""
    total = rows.sum(axis=1, keepdims=True).astype(float)
    result = np.full(rows.shape, np.nan)
    np.divide(rows, total, out=result, where=total > 0)
    return result


def pool(columns: Numbers, largest: int, places: Numbers | None = None) -> tuple[Floats, int]:
    """Averages neighbouring columns of (R, C) until at most `largest` are left.

    Args:
      columns: (R, C) matrix; NaN cells are left out of the mean.
      largest: maximal number of columns of the result.
      places: (C,) ascending whole numbers, the positions of the columns; None for 0 to C - 1.

    Returns:
      the matrix (R, ceil(W / n)) and n, the number of positions in each of its columns; W is the
      number of positions from the first to the last. Cells without any column are NaN.
    """
    at = np.arange(columns.shape[1]) if places is None else np.asarray(places - places[0], np.int64)
    width = int(at[-1]) + 1
    each = max(-(-width // largest), 1)
    pooled = np.full((len(columns), -(-width // each)), np.nan)
    group, starts = np.unique(at // each, return_index=True)
    present = np.isfinite(columns)
    total = np.add.reduceat(np.where(present, columns, 0.0), starts, axis=1)
    seen = np.add.reduceat(present.astype(float), starts, axis=1)
    pooled[:, group] = np.divide(total, seen, out=np.full(total.shape, np.nan), where=seen > 0)
    return pooled, each
