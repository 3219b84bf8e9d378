"""What is proved of an answer, in double precision, and the bounds that a problem really has.

By weak duality any prices λ on load, u on mix (|u| ≤ γ) and ν ≥ 0 on holders prove a bound:

    D = Σ_c max over its choices of Σ_e (Q_ce - w_ce λ_e - z_c·u_e + ν_e)
        + Σ_e max over its loads y of (λ_e y - μ (y - t_e)²) - Σ_e ν_e h_e.

So a bound is never the word of the solver that made the answer: a wrong answer shows as a gap.

Axis legend: `C` clients, `E` experts, `F` numbers that describe a client.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from flexmoe_jax.assignment.heuristics import take_top
from flexmoe_jax.assignment.problem import (
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
    SolverError,
    expert_load,
)
from flexmoe_jax.assignment.tiles import gram

# Sums of loads and sizes are exact up to this, relative to what is summed.
_ROUNDING = 1e-9


class Prices(NamedTuple):
    """Dual variables; arrays of NumPy or of JAX.

    Attributes:
      load: [E] λ, worth per unit of load.
      mix: [E, F] u, worth per unit of the holders' deviation from the population; None for zeros.
      holders: [E] ν, worth of a holder where experts have a least number of them; None for zeros.
    """

    load: Any
    mix: Any = None
    holders: Any = None


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
    floor = np.minimum(np.ceil(np.asarray(problem.holders_min) - 1e-9), 2.0 * problem.clients)
    return np.maximum(least, floor) * unit, np.maximum(most, floor) * unit


def count_bounds(problem: Problem) -> tuple[FloatArray, FloatArray]:
    """`effective_bounds` as numbers of holders, [E] and [E], of pairs that have one weight."""
    unit = problem.unit
    if unit:
        low, high = effective_bounds(problem)
        return np.maximum(np.rint(low / unit), 0.0), np.maximum(np.rint(high / unit), 0.0)
    floor = np.ceil(np.asarray(problem.holders_min) - 1e-9)
    most = 2.0 * problem.clients
    return np.minimum(floor, most), np.full(problem.experts, most)


def price_bound(problem: Problem, prices: Prices, low: FloatArray, high: FloatArray) -> float:
    """The bound `D` that prices prove for loads within `low` [E] and `high` [E].

    Prices out of their range, or that are no numbers, are brought into it: they prove less then,
    and never too much.
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
    """The least bound that prices prove; where bounds gave way, for the bounds as they did."""
    low, high = effective_bounds(problem)
    if relaxed:
        load, count = expert_load(problem, assignment), assignment.sum(axis=0)
        low, high = np.minimum(low, load), np.maximum(high, load)
        problem = replace(problem, holders_min=np.minimum(problem.holders_min, count))
    none = Prices(np.zeros(problem.experts))
    return min(price_bound(problem, of, low, high) for of in prices or (none,))


def require_capacities(problem: Problem, assignment: BoolArray) -> None:
    """Raises `SolverError` for an answer that does not give clients what they hold.

    With expert sizes, for one that gives them more.
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
    """Whether an answer out of its bounds is so because they cannot hold, as far as is proved.

    With one weight for all pairs this is counted, and where violations weigh the same, so is that
    the answer's are the least; otherwise prices prove it.

    Args:
      problem: what was solved.
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
        # All loads are zero, whoever holds what.
        return least > 0 or bool((problem.load_min > 0).any() or (problem.load_max < 0).any())
    count = assignment.sum(axis=0)
    missed = float(np.maximum(np.maximum(low - count, count - high), 0.0).sum())
    if np.ptp(problem.violation_weight) == 0 and missed > least:
        return False
    return least > 0 or _has_impossible_bounds(problem)


def _least_violation(capacity: IntArray, low: FloatArray, high: FloatArray) -> float:
    """By how many holders, in sum, bounds must be missed.

    Loads that clients can give are the bases of a polymatroid whose rank is `F(m) = Σ_c
    min(k_c, m)` for any m experts. So the m experts that want most can have no more than `F(m)`,
    and the m that want least have at least what the others cannot take (Edmonds 1970).
    """
    experts = low.shape[0]
    rank = np.minimum(capacity[:, None], np.arange(experts + 1)).sum(axis=0)
    wanted = np.cumsum(np.append(0.0, np.sort(low)[::-1]))
    room = np.cumsum(np.append(0.0, np.sort(high)))
    return float(np.max(wanted - rank) + np.max(rank[-1] - rank[::-1] - room))


def _has_impossible_bounds(problem: Problem) -> bool:
    """Whether pairs have one weight, and no multiple of it lies within some expert's bounds."""
    unit = problem.unit
    if not unit:
        return False
    least, most = np.ceil(problem.load_min / unit - 1e-9), np.floor(problem.load_max / unit + 1e-9)
    return bool((least > most).any())


def _load_bound(problem: Problem, price: FloatArray, low: FloatArray, high: FloatArray) -> float:
    """Sum over experts of the most that `λ y - μ (y - t)²` comes to."""
    if not problem.balance:
        # The price of an infinite bound is 0, and adds nothing: 0 times infinity would be NaN.
        dear, cheap = price > 0, price < 0
        return float(high[dear] @ price[dear]) + float(low[cheap] @ price[cheap])
    target, curve, unit = problem.load_target, problem.balance, problem.unit
    with np.errstate(over="ignore"):
        best = np.clip(target + 0.5 * price / curve, low, high)
    # Concave: the best multiple of a weight is next to the best number.
    sides = (np.floor(best / unit) * unit, np.ceil(best / unit) * unit) if unit else (best,)
    return float(
        np.max([price * y - curve * (y - target) ** 2 for y in np.clip(sides, low, high)], 0).sum()
    )


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
