"""Dividing whole numbers: in proportion to weights, or evenly under limits."""

from __future__ import annotations

import numpy as np


def apportion(total: int, weight: np.ndarray, floor: np.ndarray | None = None) -> np.ndarray:
    """Divides `total` in proportion to the weights, with at least `floor` for each.

    The real-valued division is `m_i = max(f_i, λ w_i)` with the λ at which the m_i add up to the
    total: the floors bind where they must and the rest stays proportional. It is rounded by largest
    remainders, ties to the first.

    Args:
      total: what to divide; at least the sum of the floors.
      weight: (n,) above 0.
      floor: (n,) int, none when left out.

    Returns:
      (n,) int64 that sum to `total`, none below its floor.
    """
    floor = np.zeros(len(weight), np.int64) if floor is None else np.asarray(floor, np.int64)
    weight = weight / weight.max()
    ratio = floor / weight
    order = np.argsort(ratio, kind="stable")
    # With λ at the j-th smallest ratio, the j before it are proportional and the others at floor.
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
    """Divides `total` as evenly as the limits allow (water filling).

    Args:
      limit: (n,) int.
      total: what to divide, at most the sum of the limits.
      rng: picks who gets one more where the division leaves a remainder.

    Returns:
      (n,) int64 that sum to `total`: `min(limit, level)`, one more for some of those with room.
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
