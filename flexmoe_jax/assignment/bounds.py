"""How much load each expert should get in this round.

An expert that was owed load and did not get it is owed it still: bounds lie around the fair share
*plus* the deficit of earlier rounds, so that the cumulative loads even out (the "historical
deficit" of arXiv 2512.23070, whose formula is not public: this one is ours).

Axis legend: `P` clients in this round's cohort, `E` experts.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from flexmoe_jax.assignment.problem import BoolArray, FloatArray, IntArray
from flexmoe_jax.errors import InputError

# Targets are sums of many rounds, kept in single precision: a multiple missed by rounding error
# alone is that multiple.
_ERROR = 1e-3

Loads = TypeVar("Loads", bound=Any)  # numpy.ndarray or jax.Array, [E]


def load_bounds(
    capacity: IntArray,
    deficit: FloatArray,
    *,
    slack: float = 0.1,
    load_weight: float | FloatArray = 1.0,
    share: FloatArray | None = None,
    load: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Least and greatest load of each expert in this round.

    The target of expert e is `share_e · (total load) + deficit_e`, moved into what the cohort can
    give; the bounds lie `slack · share_e · (total load)` below and above it. With one weight for
    all pairs loads are whole multiples of it, so the bounds are rounded inward, yet always leave
    room for the multiples just below and above the target. Bounds so made can be met unless
    deficits pile up on fewer experts than clients must hold; `solve` then lets them give way.

    Where others put load on the experts meanwhile, shares and slack are of all load, and the bounds
    those of what the cohort adds: an expert beyond its bounds gets no more than must be.

    Args:
      capacity: [P] experts that each client holds.
      deficit: [E] load owed from earlier rounds, as `update_deficit` keeps it.
      slack: δ ≥ 0, the part of its share by which an expert's load may miss its target.
      load_weight: load of a holder on its expert: a scalar, [P] or [P, E].
      share: [E] part of the load that each expert is meant to get (any positive scale); by
        default all get the same.
      load: [E] load that others than the cohort put on each expert; None for none.

    Returns:
      `load_min` and `load_max`, each [E], in units of `load_weight`.

    Raises:
      InputError: a slack below 0, or shares that are not positive.
    """
    if not (np.isfinite(slack) and slack >= 0):
        raise InputError("assignment.slack", slack, "give a number of at least 0")
    capacity = np.asarray(capacity)
    deficit = np.asarray(deficit, np.float64)
    experts = deficit.shape[0]
    parts = normalise_share(share, experts)
    weight = np.asarray(load_weight, np.float64)
    rows = weight.mean(axis=1) if weight.ndim == 2 else weight
    given = float(np.sum(rows * capacity))
    there = np.zeros(experts) if load is None else np.asarray(load, np.float64)
    fair = parts * (given + float(there.sum()))
    reachable = _reachable(weight, capacity > 0, experts)
    lacking = fair - there
    middle = lacking + deficit
    target = _shift_into(middle, reachable, lacking.sum())
    # Slack of the cohort's own load is small; that of all would let experts be overfull.
    around = target if load is None else middle
    low = np.minimum(around - slack * fair, target)
    high = np.maximum(around + slack * fair, target)
    grid = _common_weight(weight)
    if grid:
        low = np.minimum(_ceil(low / grid), _floor(target / grid)) * grid
        high = np.maximum(_floor(high / grid), _ceil(target / grid)) * grid
    return np.clip(low, 0.0, reachable), np.clip(high, 0.0, reachable)


def _reachable(weight: FloatArray, holders: BoolArray, experts: int) -> FloatArray:
    """[E] load that an expert would have if every client that holds any held it."""
    if weight.ndim == 2:
        return np.asarray(weight[holders].sum(axis=0))
    return np.full(experts, np.sum(np.broadcast_to(weight, holders.shape), where=holders))


def update_deficit(
    deficit: Loads,
    load: Loads,
    *,
    share: FloatArray | None = None,
    decay: float = 1.0,
) -> Loads:
    """Deficit after a round: `decay · deficit + share · Σ load - load`, [E].

    Takes NumPy arrays, or JAX arrays inside a jitted program.

    Args:
      deficit: [E] deficit before the round; zeros at the start.
      load: [E] load that the round gave.
      share: [E] part that each expert is meant to get (any positive scale); default: the same.
      decay: in [0, 1]; 1 never forgets, 0 makes every round stand alone, and `1 - 1/W` remembers
        about the last W rounds.

    Raises:
      InputError: a decay outside [0, 1], or shares that are not positive.
    """
    if not 0.0 <= decay <= 1.0:
        raise InputError("assignment.decay", decay, "give a number from 0 to 1")
    # Shares are doubles; loads on a device need not be.
    parts = normalise_share(share, load.shape[0]).astype(np.result_type(load.dtype, np.float32))
    owed = parts * load.sum()
    new: Loads = decay * deficit + owed - load
    return new


def window_deficit(loads: FloatArray, *, share: FloatArray | None = None) -> FloatArray:
    """Deficit [E] that the last rounds left, from their loads [T, E]; older rounds are forgotten.

    Args:
      loads: [T, E] loads of the rounds in the window, in any order.
      share: [E] part that each expert is meant to get (any positive scale); default: the same.
    """
    total = np.asarray(loads, np.float64).sum(axis=0)
    return normalise_share(share, total.shape[0]) * total.sum() - total


def normalise_share(share: FloatArray | None, experts: int) -> FloatArray:
    """Shares [E] scaled to sum to 1; None stands for equal ones."""
    if share is None:
        return np.full(experts, 1.0 / experts)
    parts = np.asarray(share, np.float64)
    if parts.shape != (experts,):
        raise InputError(
            "assignment.share", parts.shape, f"give one number an expert: ({experts},)"
        )
    if not (np.isfinite(parts) & (parts > 0)).all():
        raise InputError("assignment.share", parts.min(), "give numbers above 0")
    return parts / parts.sum()


def _shift_into(target: FloatArray, reachable: FloatArray, total: float) -> FloatArray:
    """Clips targets to [0, reachable], with one common shift that keeps their sum at `total`."""
    if ((target >= 0) & (target <= reachable)).all():
        return target
    low, high = -float(np.max(target, initial=0.0)), float(np.max(reachable - target, initial=0.0))
    low, high = min(low, 0.0), max(high, 0.0)
    # The sum grows with the shift; 100 halvings exhaust double precision.
    for _ in range(100):
        middle = 0.5 * (low + high)
        if np.clip(target + middle, 0.0, reachable).sum() < total:
            low = middle
        else:
            high = middle
    return np.clip(target + high, 0.0, reachable)


def _common_weight(weight: FloatArray) -> float | None:
    if weight.size == 0:
        return None
    first = float(weight.flat[0])
    return first if first > 0 and bool((weight == first).all()) else None


def _floor(value: FloatArray) -> FloatArray:
    return np.floor(value + _ERROR)


def _ceil(value: FloatArray) -> FloatArray:
    return np.ceil(value - _ERROR)
