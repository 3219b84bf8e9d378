"""Upper bounds from prices, in double precision, and the bounds that a problem really has.

By weak duality any prices λ on load prove a bound:

    D(λ) = Σ_c max over its choices of Σ_e (Q_ce - w_ce λ_e) + Σ_e (L_e^max λ_e⁺ - L_e^min λ_e⁻).

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

import numpy as np

from flexmoe_jax.assignment.heuristics import take_top
from flexmoe_jax.assignment.problem import FloatArray, IntArray, Problem


def effective_bounds(problem: Problem) -> tuple[FloatArray, FloatArray]:
    """Finite load bounds [E], [E] that say the same for whole assignments.

    With one weight for all pairs they are rounded inward to multiples of it, which makes every
    vertex of the relaxation integral, and floors on holders become floors on load; an interval
    that holds no multiple becomes the nearest one, or the two that are equally near.
    """
    reach = _reach(problem)
    # Beyond what all clients weigh, one bound says as much as another.
    beyond = np.where(reach > 0, 2.0 * reach, 1.0)
    low, high = np.clip(problem.load_min, -1.0, beyond), np.minimum(problem.load_max, beyond)
    low, high = np.minimum(low, high), np.maximum(high, low)
    unit = problem.unit
    if not unit:
        return low, high
    inner_low, inner_high = np.ceil(low / unit - 1e-9), np.floor(high / unit + 1e-9)
    empty = inner_low > inner_high
    below, above = low - inner_high * unit, inner_low * unit - high
    least = np.where(empty & (below <= above), inner_high, inner_low)
    most = np.where(empty & (above <= below), inner_low, inner_high)
    floor = np.ceil(np.asarray(problem.holders_min) - 1e-9)
    return np.maximum(least, floor) * unit, np.maximum(most, floor) * unit


def has_impossible_bounds(problem: Problem) -> bool:
    """Whether pairs have one weight, and no multiple of it lies within some expert's bounds."""
    unit = problem.unit
    if not unit:
        return False
    least, most = np.ceil(problem.load_min / unit - 1e-9), np.floor(problem.load_max / unit + 1e-9)
    return bool((least > most).any())


def price_bound(problem: Problem, prices: FloatArray, low: FloatArray, high: FloatArray) -> float:
    """`D(λ)` at prices [E] for load bounds [E], [E]; clients fill their capacity at best."""
    reduced = problem.fitness - problem.weights * prices
    if problem.expert_size is None:
        of_clients = float(np.sum(reduced, where=take_top(reduced, problem.capacity)))
    else:
        of_clients = _knapsack_bound(reduced, np.asarray(problem.expert_size), problem.capacity)
    # An infinite bound has price nil, and nil times infinity counts as nil.
    dear, cheap = prices > 0, prices < 0
    return of_clients + float(high[dear] @ prices[dear]) + float(low[cheap] @ prices[cheap])


def _knapsack_bound(worth: FloatArray, size: FloatArray, capacity: IntArray | FloatArray) -> float:
    """Dantzig's bound: each client fills up by worth per size, the last expert in part."""
    order = np.argsort(-worth / size, axis=1)
    gain = np.maximum(np.take_along_axis(worth, order, axis=1), 0.0)
    sizes = size[order]
    room = capacity[:, None] - (np.cumsum(sizes, axis=1) - sizes)
    return float(np.sum(gain * np.clip(room / sizes, 0.0, 1.0)))


def _reach(problem: Problem) -> FloatArray:
    """Load [E] if every client held the expert."""
    weight = np.asarray(problem.load_weight)
    if weight.ndim == 2:
        return weight.sum(axis=0)
    total = float(weight.sum()) if weight.ndim else float(weight) * problem.clients
    return np.full(problem.experts, total)
