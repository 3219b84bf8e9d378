"""Problems whose pairs all weigh the same: whole numbers of holders, and whole-number costs.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from flexmoe_jax.assignment.certificate import Prices, count_bounds
from flexmoe_jax.assignment.closer import View, look, look_closer
from flexmoe_jax.assignment.paths import (
    LoadCost,
    Optimum,
    augment,
    best_choices,
    potentials,
    swap_costs,
)
from flexmoe_jax.assignment.prices import estimate_prices
from flexmoe_jax.assignment.problem import BoolArray, FloatArray, Problem, seconds_left

# Pairs up to which it is faster to begin with prices of zero.
_FEW_PAIRS = 2_000
# The most that a whole-number cost may come to, so that sums of several stay below 2^53.
_DEAREST = 2.0**50
# What one unit of violation may weigh more than another.
_PRIORITY = 1024.0
# Holders to move that make prices good enough, and paths after which bad ones are given up.
_FEW_MOVES, _MANY_PATHS = 1024, 256


def solve_paths(problem: Problem, deadline: float = np.inf) -> tuple[BoolArray, Prices]:
    """The exact optimum of a problem whose pairs all have one weight.

    Exact means: costs are rounded to about 2^-42 of the largest difference between a client's
    worths.

    Args:
      problem: what to solve, without diversity or expert sizes.
      deadline: on the clock of `time.perf_counter`.

    Returns:
      The assignment [C, E] bool, and prices that prove it.

    Raises:
      SolverError: the deadline passed.
    """
    view, prices = look(problem), np.zeros(problem.experts)
    if problem.fitness.size > _FEW_PAIRS and problem.unit and not problem.balance:
        seconds_left(deadline)
        prices = estimate_prices(problem)
        # Ties make for many moves on few paths, and no prices could tell them apart.
        if _moves(problem, view, prices) > _FEW_MOVES:
            if found := _solve_view(problem, view, prices, deadline, _MANY_PATHS):
                return found.assignment, _per_load(problem, found.prices)
            misses = partial(_moves, problem)
            view, prices = look_closer(problem, prices, misses, _FEW_MOVES, deadline)
    found = _solve_view(problem, view, prices, deadline)
    assert found is not None
    of_base = view.base * (problem.unit or 0.0)
    return found.assignment, _per_load(problem, of_base + found.prices)


def _whole(problem: Problem, view: View) -> tuple[FloatArray, LoadCost, float]:
    """Fitness [C, E] and the cost of holders in whole quanta, and what a quantum is worth."""
    base = view.base * (problem.unit or 0.0)
    # The most that a path of swaps can be worth, balance and earlier prices included.
    widest = look(problem).span + 2 * _curve(problem) * problem.clients
    path = 2.0 * (problem.experts + 1) * (widest + float(np.max(np.abs(base))))
    priority = np.asarray(problem.violation_weight / np.min(problem.violation_weight))
    priority = np.minimum(priority, _PRIORITY)
    quantum = float(np.max(priority)) * path / _DEAREST or 1.0
    low, high = count_bounds(problem)
    cost = LoadCost(
        low,
        high,
        # A unit out of bounds outweighs any path.
        np.rint(priority * max(path / quantum, 1.0)),
        np.rint(base / quantum),
        _curve(problem) / quantum,
        problem.load_target / (problem.unit or 1.0),
    )
    # Column by column, as `augment` works on it: at no time are there two copies.
    fitness = np.array(view.worth, order="F")
    np.divide(fitness, quantum, out=fitness)
    return np.rint(fitness, out=fitness), cost, quantum


def _moves(problem: Problem, view: View, prices: FloatArray) -> float:
    """How many holders must move from where these prices on load send them."""
    fitness, cost, quantum = _whole(problem, view)
    whole = np.rint(prices * (problem.unit or 0.0) / quantum)
    count = best_choices(fitness, whole, problem.capacity).sum(axis=0).astype(np.float64)
    start = cost.start(whole, count)
    return float(np.maximum(count - start, 0.0).sum() + max(start.sum() - count.sum(), 0.0))


def _solve_view(
    problem: Problem, view: View, prices: FloatArray, deadline: float, most: float = np.inf
) -> Optimum | None:
    """The optimum from these prices on load on; None where it takes more paths than `most`.

    The prices that it finds are per holder, beside those of the view.
    """
    fitness, cost, quantum = _whole(problem, view)
    whole = np.rint(prices * (problem.unit or 0.0) / quantum)
    found = augment(fitness, problem.capacity, cost, whole, deadline, most)
    return found and found._replace(prices=found.prices * quantum)


def prices_of(problem: Problem, assignment: BoolArray) -> Prices:
    """Prices that prove an assignment [C, E] optimal where it is: shortest distances from it."""
    fitness, cost, quantum = _whole(problem, look(problem))
    load = assignment.sum(axis=0).astype(np.float64)
    prices = potentials(swap_costs(fitness, assignment), cost, load) * quantum
    return _per_load(problem, prices)


def _per_load(problem: Problem, prices: FloatArray) -> Prices:
    """Prices [E] per holder as prices on load, or on holders where a holder is no load."""
    if problem.unit:
        return Prices(prices / problem.unit)
    return Prices(np.zeros(problem.experts), holders=np.maximum(-prices, 0.0))


def _curve(problem: Problem) -> float:
    """Worth of one squared holder off target."""
    return problem.balance * (problem.unit or 0.0) ** 2
