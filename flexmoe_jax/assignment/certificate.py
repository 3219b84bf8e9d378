"""Certificates: upper bounds on the value, in double precision, and a problem's effective bounds.

By weak duality, any prices λ on load, u on mix (|u| ≤ γ) and ν ≥ 0 on holders prove a bound:

    D = Σ_c max over its choices of Σ_e (Q_ce - w_ce λ_e - z_c·u_e + ν_e)
        + Σ_e max over its loads y of (λ_e y - μ (y - t_e)²) - Σ_e ν_e h_e.

So the bound does not rely on the solver that found the assignment: a wrong assignment shows as a
gap.

Axis legend: `C` clients, `E` experts, `F` features in a client's descriptor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from flexmoe_jax.assignment.heuristics import take_top
from flexmoe_jax.assignment.problem import (
    LOAD_TOLERANCE,
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
    SolverError,
    expert_load,
)
from flexmoe_jax.assignment.tiles import gram

# Sums of loads and sizes are exact up to this, relative to the sum.
_ROUNDING = 1e-9


class Prices(NamedTuple):
    """Dual variables, as NumPy or JAX arrays.

    Attributes:
      load: [E] λ, price per unit of load.
      mix: [E, F] u, price per unit of the holders' deviation from the population; None for zeros.
      holders: [E] ν, price of one holder if experts need a minimum number; None for zeros.
    """

    load: Any
    mix: Any = None
    holders: Any = None


def effective_bounds(problem: Problem) -> tuple[FloatArray, FloatArray]:
    """Computes finite load bounds [E], [E] that are equivalent for integral assignments.

    With one weight for all pairs, the bounds are rounded inward to multiples of it, which makes
    every vertex of the relaxation integral. Minimum numbers of holders then become minimum loads.
    An interval that contains no multiple becomes the nearest one, or the two equally near ones: its
    own miss, which no assignment can avoid, then counts as none.
    """
    reach = _reach(problem)
    # Bounds above the total weight of all clients are equivalent, so they can be made finite.
    beyond = np.where(reach > 0, 2.0 * reach, 1.0)
    low, high = np.clip(problem.load_min, -1.0, beyond), np.minimum(problem.load_max, beyond)
    low, high = np.minimum(low, high), np.maximum(high, low)
    unit = problem.unit
    if not unit:
        return low, high
    inner_low = np.ceil(low / unit - LOAD_TOLERANCE)
    inner_high = np.floor(high / unit + LOAD_TOLERANCE)
    empty = inner_low > inner_high
    below, above = low - inner_high * unit, inner_low * unit - high
    least = np.where(empty & (below <= above), inner_high, inner_low)
    most = np.where(empty & (above <= below), inner_low, inner_high)
    floor = np.minimum(problem.holders_min, 2.0 * problem.clients)
    return np.maximum(least, floor) * unit, np.maximum(most, floor) * unit


def count_bounds(problem: Problem) -> tuple[FloatArray, FloatArray]:
    """Computes `effective_bounds` as numbers of holders, [E] and [E], if pairs have one weight."""
    unit = problem.unit
    if unit:
        low, high = effective_bounds(problem)
        return np.maximum(np.rint(low / unit), 0.0), np.maximum(np.rint(high / unit), 0.0)
    most = np.full(problem.experts, 2.0 * problem.clients)
    return np.minimum(problem.holders_min, most), most


def price_bound(problem: Problem, prices: Prices, low: FloatArray, high: FloatArray) -> float:
    """Computes the bound `D` that prices prove for loads within `low` [E] and `high` [E].

    Prices that are out of range or not finite are moved into their range. The bound then stays
    valid; it is only weaker.
    """
    load = np.nan_to_num(np.asarray(prices.load, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    reduced = problem.fitness - problem.weights * load
    if prices.mix is not None and problem.diversity:
        mix = np.nan_to_num(np.asarray(prices.mix, np.float64), nan=0.0)
        most = problem.diversity
        reduced -= gram(problem.deviation.T, np.clip(mix, -most, most).T)
    of_floors = 0.0
    if prices.holders is not None:
        held = np.maximum(np.nan_to_num(np.asarray(prices.holders, np.float64), posinf=0.0), 0.0)
        reduced += held
        of_floors = float(held @ problem.holders_min)
    if problem.expert_size is None:
        of_clients = float(np.sum(reduced, where=take_top(reduced, problem.capacity)))
    else:
        of_clients = _knapsack_bound(reduced, np.asarray(problem.expert_size), problem.capacity)
    return of_clients + _load_bound(problem, load, low, high) - of_floors


def prove(
    problem: Problem, assignment: BoolArray, prices: tuple[Prices, ...], relaxed: bool
) -> float:
    """Computes the lowest bound that prices prove; if `relaxed`, for the relaxed load bounds."""
    low, high = effective_bounds(problem)
    if relaxed:
        load, count = expert_load(problem, assignment), assignment.sum(axis=0)
        low, high = np.minimum(low, load), np.maximum(high, load)
        problem = replace(problem, holders_min=np.minimum(problem.holders_min, count))
    none = Prices(np.zeros(problem.experts))
    return min(price_bound(problem, of, low, high) for of in prices or (none,))


def require_capacities(problem: Problem, assignment: BoolArray) -> None:
    """Raises `SolverError` if a client does not hold exactly as many experts as its capacity.

    With expert sizes, raises it if a client's experts exceed its capacity.
    """
    if assignment.shape != problem.fitness.shape or assignment.dtype != np.bool_:
        raise SolverError(f"the answer has the wrong shape: {assignment.shape}")
    if problem.expert_size is None:
        wrong = assignment.sum(axis=1) != problem.capacity
    else:
        size = np.einsum("ce,e->c", assignment, problem.expert_size)
        wrong = size > problem.capacity * (1 + _ROUNDING)
    if wrong.any():
        raise SolverError(f"the answer does not keep to the capacity of client {wrong.argmax()}")


def gave_way(problem: Problem, assignment: BoolArray, witness: Prices | None) -> bool:
    """Checks whether an assignment is out of bounds because the bounds provably cannot be met.

    With one weight for all pairs, this is checked by counting holders. If violations also weigh
    the same, the assignment's violation must be the smallest possible. Otherwise prices prove it.

    Args:
      problem: the problem that was solved.
      assignment: [C, E] bool.
      witness: prices at which the load bounds contradict the capacities (Farkas), or None.
    """
    if problem.unit is None or problem.expert_size is not None:
        if witness is None:
            return False
        worthless = replace(
            problem, fitness=np.zeros(problem.fitness.shape), balance=0.0, diversity=0.0
        )
        slip = _ROUNDING * max(1.0, float(_reach(problem).sum()))
        return price_bound(worthless, witness, *effective_bounds(problem)) < -slip
    low, high = count_bounds(problem)
    least = _least_violation(problem.capacity, low, high)
    if not problem.unit:
        # All loads are zero for every assignment.
        return least > 0 or bool((problem.load_min > 0).any() or (problem.load_max < 0).any())
    count = assignment.sum(axis=0)
    missed = float(np.maximum(np.maximum(low - count, count - high), 0.0).sum())
    if np.ptp(problem.violation_weight) == 0 and missed > least:
        return False
    return least > 0 or _has_impossible_bounds(problem)


def _least_violation(capacity: IntArray, low: FloatArray, high: FloatArray) -> float:
    """Computes the smallest total violation of the bounds, in holders.

    The possible loads are the bases of a polymatroid whose rank is `F(m) = Σ_c min(k_c, m)` for
    any m experts. So the m experts with the largest lower bounds get at most `F(m)` holders. The m
    experts with the smallest upper bounds get at least what the others cannot take (Edmonds 1970).
    """
    experts = low.shape[0]
    rank = np.minimum(capacity[:, None], np.arange(experts + 1)).sum(axis=0)
    wanted = np.cumsum(np.append(0.0, np.sort(low)[::-1]))
    room = np.cumsum(np.append(0.0, np.sort(high)))
    return float(np.max(wanted - rank) + np.max(rank[-1] - rank[::-1] - room))


def _has_impossible_bounds(problem: Problem) -> bool:
    """Checks whether pairs have one weight and some expert's bounds contain no multiple of it."""
    unit = problem.unit
    if not unit:
        return False
    least, most = np.ceil(problem.load_min / unit - 1e-9), np.floor(problem.load_max / unit + 1e-9)
    return bool((least > most).any())


def _load_bound(problem: Problem, price: FloatArray, low: FloatArray, high: FloatArray) -> float:
    """Sums over experts the maximum of `λ y - μ (y - t)²`."""
    if not problem.balance:
        # The price of an infinite bound is 0 and adds nothing, but 0 times infinity would be NaN.
        dear, cheap = price > 0, price < 0
        return float(high[dear] @ price[dear]) + float(low[cheap] @ price[cheap])
    target, curve, unit = problem.load_target, problem.balance, problem.unit
    with np.errstate(over="ignore"):
        best = np.clip(target + 0.5 * price / curve, low, high)
    # The function is concave, so the best multiple of the weight is next to the best real number.
    sides = (np.floor(best / unit) * unit, np.ceil(best / unit) * unit) if unit else (best,)
    return float(
        np.max([price * y - curve * (y - target) ** 2 for y in np.clip(sides, low, high)], 0).sum()
    )


def _knapsack_bound(worth: FloatArray, size: FloatArray, capacity: IntArray | FloatArray) -> float:
    """Computes Dantzig's bound: each client fills up by worth per size, the last expert in part."""
    order = np.argsort(-worth / size, axis=1)
    gain = np.maximum(np.take_along_axis(worth, order, axis=1), 0.0)
    sizes = size[order]
    room = capacity[:, None] - (np.cumsum(sizes, axis=1) - sizes)
    return float(np.sum(gain * np.clip(room / sizes, 0.0, 1.0)))


def _reach(problem: Problem) -> FloatArray:
    """Computes the load [E] of each expert if every client held it."""
    weight = np.asarray(problem.load_weight)
    if weight.ndim == 2:
        return weight.sum(axis=0)
    total = float(weight.sum()) if weight.ndim else float(weight) * problem.clients
    return np.full(problem.experts, total)
