"""Divide a whole number into whole parts: in proportion to weights, or evenly under limits."""

from __future__ import annotations

import numpy as np


def apportion(total: int, weight: np.ndarray, floor: np.ndarray | None = None) -> np.ndarray:
    """Divide `total` in proportion to the weights, with at least `floor` for each part.

    The real-valued division is `m_i = max(f_i, λ w_i)`, where λ makes the m_i add up to the total.
    Some parts are equal to their floor, and the others stay proportional to their weights. The
    parts are rounded by the largest-remainder method; ties go to the first.

    Args:
      total: the number to divide; at least the sum of the floors.
      weight: (n,) above 0.
      floor: (n,) int; if omitted, all floors are 0.

    Returns:
      (n,) int64 that sum to `total`, each at least its floor.
    """
    floor = np.zeros(len(weight), np.int64) if floor is None else np.asarray(floor, np.int64)
    weight = weight / weight.max()
    ratio = floor / weight
    order = np.argsort(ratio, kind="stable")
    # With λ at the j-th smallest ratio, the j parts before it are proportional to their weights and
    # the others equal their floors.
    weight_before = np.concatenate([[0.0], np.cumsum(weight[order])])
    floor_after = np.concatenate([[0], np.cumsum(floor[order][::-1])])[::-1]
    needed = ratio[order] * weight_before[:-1] + floor_after[:-1]
    free = max(int(np.searchsorted(needed, total, side="right")), 1)
    level = (total - floor_after[free]) / weight_before[free]
    real = np.maximum(floor, level * weight)
    whole: np.ndarray = np.maximum(floor, np.floor(real + 1e-9).astype(np.int64))
    remainder = total - int(whole.sum())
    winners = np.argsort(whole - real, kind="stable")[:remainder]
    whole[winners] += 1
    return whole


def fill(limit: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Divide `total` as evenly as the limits allow (water filling).

    Args:
      limit: (n,) int.
      total: the number to divide, at most the sum of the limits.
      rng: chooses the parts that get one more if the division leaves a remainder.

    Returns:
      (n,) int64 that sum to `total`: `min(limit, level)`, plus one for some parts below the limit.
    """
    ordered = np.sort(limit)
    needed = np.cumsum(ordered) + ordered * np.arange(len(ordered) - 1, -1, -1)
    full = int(np.searchsorted(needed, total, side="right"))
    if full == len(ordered):
        return limit.astype(np.int64)
    level, extra = divmod(total - int(ordered[:full].sum()), len(ordered) - full)
    filled: np.ndarray = np.minimum(limit, level).astype(np.int64)
    filled[rng.permutation(np.flatnonzero(limit > level))[:extra]] += 1
    return filled
