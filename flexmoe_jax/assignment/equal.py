"""Problems whose pairs all weigh the same: whole numbers of holders, and whole-number costs.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from flexmoe_jax.assignment.certificate import Prices, count_bounds
from flexmoe_jax.assignment.heuristics import take_top
from flexmoe_jax.assignment.paths import (
    LoadCost,
    Optimum,
    augment,
    best_choices,
    potentials,
    swap_costs,
)
from flexmoe_jax.assignment.prices import estimate_prices
from flexmoe_jax.assignment.problem import BoolArray, FloatArray, Problem

# Pairs up to which prices from nil are the faster way.
_FEW_PAIRS = 2_000
# The most that a whole-number cost may come to, so that sums of several stay below 2^53.
_DEAREST = 2.0**50
# What one unit of violation may weigh more than another.
_PRIORITY = 1024.0
# Holders to move that make prices good enough, and paths after which bad ones are given up.
_FEW_MOVES, _MANY_PATHS = 1024, 256
# How often to look closer, how often in vain, and by how much each time.
_LEVELS, _PATIENCE, _CLOSER = 8, 2, 2.0**-6


class _View(NamedTuple):
    """A problem as it looks from prices that are nearly right.

    Attributes:
      worth: [C, E] fitness less those prices, around nil for pairs that are in doubt.
      base: [E] the prices, per holder.
      span: within which worth decides.
    """

    worth: FloatArray
    base: FloatArray
    span: float


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
    view = _View(problem.fitness, np.zeros(problem.experts), _span(problem))
    nil = np.zeros(problem.experts)
    if problem.fitness.size <= _FEW_PAIRS or problem.balance or not problem.unit:
        found = _solve_view(problem, view, nil, deadline)
        assert found is not None
        return found.assignment, _per_load(problem, found.prices)
    least, best, prices, since = np.inf, view, nil, 0
    for level in range(_LEVELS):
        estimate = _estimate(problem, view)
        moves = _moves(problem, view, estimate)
        since = 0 if moves < 0.95 * least else since + 1
        if moves < least:
            least, best, prices = moves, view, estimate
        if moves <= _FEW_MOVES or since == _PATIENCE:
            break
        # Ties make for many moves on few paths, and no prices could tell them apart.
        if level == 0 and (found := _solve_view(problem, view, prices, deadline, _MANY_PATHS)):
            return found.assignment, _per_load(problem, found.prices)
        view = _closer(problem, view, estimate)
    found = _solve_view(problem, best, prices, deadline)
    assert found is not None
    return found.assignment, _per_load(problem, best.base + found.prices)


def _estimate(problem: Problem, view: _View) -> FloatArray:
    """Nearly optimal prices [E] per holder beside those of the view."""
    assert problem.unit
    if view.worth is problem.fitness:
        return estimate_prices(problem) * problem.unit
    # A price belongs to the bound that it pays for; where it may be nil, to either.
    low, high = (end * problem.unit for end in count_bounds(problem))
    seen = replace(
        problem,
        fitness=np.clip(view.worth, -0.5 * view.span, 0.5 * view.span),
        load_min=np.where(view.base > 0, high, low),
        load_max=np.where(view.base < 0, low, high),
    )
    return estimate_prices(seen) * problem.unit


def _closer(problem: Problem, view: _View, prices: FloatArray) -> _View:
    """The view from prices that are better still, of a smaller span."""
    span = _CLOSER * view.span
    reduced = view.worth - prices
    held = take_top(reduced, problem.capacity)
    worst_in = np.min(reduced, axis=1, where=held, initial=np.inf)
    best_out = np.max(reduced, axis=1, where=~held, initial=-np.inf)
    threshold = np.where(np.isinf(best_out), worst_in, best_out)
    both = np.isfinite(worst_in) & np.isfinite(best_out)
    threshold[both] = 0.5 * (worst_in + best_out)[both]
    total = view.base + prices
    base = np.where(np.abs(total) <= 0.5 * span, 0.0, total)
    return _View(view.worth - (base - view.base) - threshold[:, None], base, span)


def _whole(problem: Problem, view: _View) -> tuple[FloatArray, LoadCost, float]:
    """Fitness [C, E] and the cost of loads in whole quanta, and what a quantum is worth."""
    # The most that a path of swaps can be worth, balance and earlier prices included.
    path = 2.0 * (problem.experts + 1) * (_span(problem) + float(np.max(np.abs(view.base))))
    priority = np.asarray(problem.violation_weight / np.min(problem.violation_weight))
    priority = np.minimum(priority, _PRIORITY)
    quantum = float(np.max(priority)) * path / _DEAREST or 1.0
    low, high = count_bounds(problem)
    cost = LoadCost(
        low,
        high,
        # A unit out of bounds outweighs any path.
        np.rint(priority * max(path / quantum, 1.0)),
        np.rint(view.base / quantum),
        _curve(problem) / quantum,
        problem.load_target / (problem.unit or 1.0),
    )
    return np.rint(view.worth / quantum), cost, quantum


def _moves(problem: Problem, view: _View, prices: FloatArray) -> float:
    """How many holders must move from where these prices send them."""
    fitness, cost, quantum = _whole(problem, view)
    whole = np.rint(prices / quantum)
    count = best_choices(fitness, whole, problem.capacity).sum(axis=0).astype(np.float64)
    start = cost.start(whole, count)
    return float(np.maximum(count - start, 0.0).sum() + max(start.sum() - count.sum(), 0.0))


def _solve_view(
    problem: Problem, view: _View, prices: FloatArray, deadline: float, most: float = np.inf
) -> Optimum | None:
    """The optimum from these prices on; None where it takes more paths than `most`.

    Prices, given and found, are per holder and beside those of the view.
    """
    fitness, cost, quantum = _whole(problem, view)
    whole = np.rint(prices / quantum)
    found = augment(fitness, problem.capacity, cost, whole, deadline, most)
    return found and found._replace(prices=found.prices * quantum)


def prices_of(problem: Problem, assignment: BoolArray) -> Prices:
    """Prices that prove an assignment [C, E] optimal where it is: shortest distances from it."""
    fitness, cost, quantum = _whole(problem, _View(problem.fitness, np.zeros(problem.experts), 0.0))
    load = assignment.sum(axis=0).astype(np.float64)
    prices = potentials(swap_costs(fitness, assignment), cost, load) * quantum
    return _per_load(problem, prices)


def _per_load(problem: Problem, prices: FloatArray) -> Prices:
    """Prices [E] per holder as prices on load, or on holders where a holder is no load."""
    if problem.unit:
        return Prices(prices / problem.unit)
    return Prices(np.zeros(problem.experts), holders=np.maximum(-prices, 0.0))


def _span(problem: Problem) -> float:
    """The most that one swap can win or lose, by fitness and balance."""
    span = float(np.max(np.ptp(problem.fitness, axis=1), initial=0.0)) if problem.clients else 0.0
    return span + 2 * _curve(problem) * problem.clients


def _curve(problem: Problem) -> float:
    """Worth of one squared holder off target."""
    return problem.balance * (problem.unit or 0.0) ** 2
