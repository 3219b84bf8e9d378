"""Load bounds: how much load each expert should get in this round.

If an expert gets less load than it should, the difference is carried over to later rounds. The
bounds lie around the fair share *plus* the deficit of earlier rounds, so that the cumulative loads
even out. (This is the "historical deficit" of arXiv 2512.23070. Its formula is not public: this
one is ours.)

Axis legend: `P` clients in this round's cohort, `E` experts.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from flexmoe_jax.assignment.problem import BoolArray, FloatArray, IntArray
from flexmoe_jax.errors import InputError

# Targets are sums over many rounds, kept in single precision. A number that misses a whole
# multiple only by rounding error counts as that multiple.
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
    """Computes the minimum and maximum load of each expert in this round.

    The target of expert e is `share_e · (total load) + deficit_e`, moved into the range that the
    cohort can reach. The bounds lie `slack · share_e · (total load)` below and above it. With one
    weight for all pairs, loads are whole multiples of it. The bounds are then rounded inward, but
    they always include the multiples just below and above the target. Such bounds can be met
    unless deficits concentrate on fewer experts than clients must hold; `solve` then relaxes them.

    With `load`, shares and slack refer to the total load, and the bounds to the load that the
    cohort adds: an expert beyond its bounds gets no more load than necessary.

    Args:
      capacity: [P] number of experts that each client holds.
      deficit: [E] load owed from earlier rounds, as `update_deficit` computes it.
      slack: δ ≥ 0, the fraction of its share by which an expert's load may miss its target.
      load_weight: load that a client adds to an expert it holds: a scalar, [P] or [P, E].
      share: [E] part of the load that each expert should get (any positive scale); by
        default all get the same.
      load: [E] load that clients outside the cohort put on each expert; None for none.

    Returns:
      `load_min` and `load_max`, each [E], in units of `load_weight`.

    Raises:
      InputError: the slack is below 0, or shares are not positive.
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
    # Without outside load, the bounds lie around the reachable target. With it, the slack is a
    # fraction of the total load, so bounds around the target would let experts be overloaded.
    around = target if load is None else middle
    low = np.minimum(around - slack * fair, target)
    high = np.maximum(around + slack * fair, target)
    grid = _common_weight(weight)
    if grid:
        low = np.minimum(_ceil(low / grid), _floor(target / grid)) * grid
        high = np.maximum(_floor(high / grid), _ceil(target / grid)) * grid
    return np.clip(low, 0.0, reachable), np.clip(high, 0.0, reachable)


def _reachable(weight: FloatArray, holders: BoolArray, experts: int) -> FloatArray:
    """Computes the load [E] of each expert if every client with capacity held it."""
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
    """Computes the deficit after a round: `decay · deficit + share · Σ load - load`, [E].

    Accepts NumPy arrays, or JAX arrays inside a jitted program.

    Args:
      deficit: [E] deficit before the round; zeros at the start.
      load: [E] load of each expert in the round.
      share: [E] part that each expert should get (any positive scale); default: the same.
      decay: in [0, 1]; with 1 no round is forgotten, with 0 only the last round counts, and with
        `1 - 1/W` about the last W rounds count.

    Raises:
      InputError: the decay is outside [0, 1], or shares are not positive.
    """
    if not 0.0 <= decay <= 1.0:
        raise InputError("assignment.decay", decay, "give a number from 0 to 1")
    # Shares are in double precision; loads on a device may be in single precision.
    parts = normalise_share(share, load.shape[0]).astype(np.result_type(load.dtype, np.float32))
    owed = parts * load.sum()
    new: Loads = decay * deficit + owed - load
    return new


def window_deficit(loads: FloatArray, *, share: FloatArray | None = None) -> FloatArray:
    """Computes the deficit [E] of the rounds in a window from their loads [T, E].

    Rounds outside the window do not count.

    Args:
      loads: [T, E] loads of the rounds in the window, in any order.
      share: [E] part that each expert should get (any positive scale); default: the same.
    """
    total = np.asarray(loads, np.float64).sum(axis=0)
    return normalise_share(share, total.shape[0]) * total.sum() - total


def normalise_share(share: FloatArray | None, experts: int) -> FloatArray:
    """Scales shares [E] to sum to 1; None means equal shares."""
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
    """Clips targets to [0, reachable] after a common shift that keeps their sum at `total`."""
    if ((target >= 0) & (target <= reachable)).all():
        return target
    low, high = -float(np.max(target, initial=0.0)), float(np.max(reachable - target, initial=0.0))
    low, high = min(low, 0.0), max(high, 0.0)
    # The sum grows with the shift. 100 bisection steps reach double precision.
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
