"""Exact solver for problems with equal weights: integral holder counts and integral costs.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from flexmoe_jax.assignment.certificate import Prices, count_bounds
from flexmoe_jax.assignment.closer import View, look, look_closer
from flexmoe_jax.assignment.heuristics import row_blocks
from flexmoe_jax.assignment.paths import (
    LoadCost,
    Optimum,
    augment,
    best_choices,
    potentials,
    swap_costs,
)
from flexmoe_jax.assignment.prices import estimate_prices
from flexmoe_jax.assignment.problem import (
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
    seconds_left,
)

# Number of pairs up to which it is faster to start from prices of zero.
_FEW_PAIRS = 2_000
# Largest whole-number cost, so that sums of several costs stay below 2^53.
_DEAREST = 2.0**50
# Largest ratio between two violation weights.
_PRIORITY = 1024.0
# Prices are good enough if at most this many holders must move; and paths after which an attempt
# with worse prices stops.
_FEW_MOVES, _MANY_PATHS = 1024, 256
# At good prices, clients that the search begins with: one in so many, so many a move, and at least.
_OF_CLIENTS, _A_MOVE, _FEW_CLIENTS = 8, 32, 4096


def solve_paths(problem: Problem, deadline: float = np.inf) -> tuple[BoolArray, Prices]:
    """Computes the exact optimum of a problem whose pairs all have one weight.

    Exact means: costs are rounded to multiples of `r (E + 1) d 2^-49`. Here r, at most 1024, is the
    largest ratio between two violation weights. d is the largest difference between a client's
    fitness values, plus the steepest slope of the balance term and the largest price that was
    subtracted before.

    Args:
      problem: the problem to solve, without diversity or expert sizes.
      deadline: on the `time.perf_counter` clock.

    Returns:
      The assignment [C, E] bool, and prices that prove it.

    Raises:
      SolverError: the deadline passed.
    """
    view, prices = look(problem), np.zeros(problem.experts)
    if problem.fitness.size > _FEW_PAIRS and problem.unit and not problem.balance:
        seconds_left(deadline)
        prices = estimate_prices(problem)
        start = _begin(problem, view, prices)
        # Ties need many moves but few paths, and no prices can separate them: first try with few
        # paths.
        many = start.moves > _FEW_MOVES
        if found := start.solve(problem, deadline, _MANY_PATHS if many else np.inf):
            return found.assignment, _per_load(problem, found.prices)
        del start  # As large as the problem.
        misses = partial(_moves, problem)
        view, prices = look_closer(problem, prices, misses, _FEW_MOVES, deadline)
    found = _begin(problem, view, prices).solve(problem, deadline)
    assert found is not None
    of_base = view.base * (problem.unit or 0.0)
    return found.assignment, _per_load(problem, of_base + found.prices)


class _Start(NamedTuple):
    """Where the search for the optimum starts, in whole quanta.

    Attributes:
      fitness: [C, E].
      cost: of the loads.
      prices: [E] per holder.
      held: [C, E] the clients' best choices at these prices.
      moves: how many holders must move from there.
      quantum: the value of a quantum.
    """

    fitness: FloatArray
    cost: LoadCost
    prices: FloatArray
    held: BoolArray
    moves: float
    quantum: float

    def solve(self, problem: Problem, deadline: float, most: float = np.inf) -> Optimum | None:
        """Finds the optimum; None after more than `most` paths.

        At good prices, most clients keep what they chose. So the search begins with the clients
        whose choice is closest. Those whose choice its prices change come in, until there are none.

        The returned prices are per holder, and add to those of the view.
        """
        held, prices, left, paths = self.held.copy(), self.prices, most, 0
        clients = self._closest(problem.clients)
        while True:
            capacity = problem.capacity[clients]
            decided = (held.sum(axis=0) - held[clients].sum(axis=0)).astype(np.float64)
            start = prices, held[clients]
            cost = self.cost.beside(decided)
            found = augment(self.fitness[clients], capacity, cost, start, deadline, left)
            if found is None:
                return None
            held[clients], prices = found.assignment, found.prices
            left, paths = left - found.paths, paths + found.paths
            changed = np.flatnonzero(_margin(self.fitness, prices, held) < 0)
            if not changed.size:
                return Optimum(held, prices * self.quantum, paths)
            held[changed] = best_choices(self.fitness[changed], prices, problem.capacity[changed])
            clients = np.union1d(clients, changed)

    def _closest(self, clients: int) -> IntArray:
        """Returns the clients that lose least by another choice; all, if many must move."""
        number = max(clients // _OF_CLIENTS, int(_A_MOVE * self.moves), _FEW_CLIENTS)
        if number >= clients:
            return np.arange(clients)
        margin = _margin(self.fitness, self.prices, self.held)
        return np.sort(np.argpartition(margin, number)[:number])


def _margin(fitness: FloatArray, prices: FloatArray, held: BoolArray) -> FloatArray:
    """Computes what each client loses at least, [C], by another choice at these prices."""
    margin = np.empty(fitness.shape[0])
    for rows in row_blocks(fitness.shape):
        worth, of = fitness[rows] - prices, held[rows]
        worst_in = np.min(worth, axis=1, where=of, initial=np.inf)
        margin[rows] = worst_in - np.max(worth, axis=1, where=~of, initial=-np.inf)
    return margin


def _whole(problem: Problem, view: View) -> tuple[FloatArray, LoadCost, float]:
    """Converts fitness [C, E] and holder costs to whole quanta; also returns a quantum's value."""
    base = view.base * (problem.unit or 0.0)
    target = problem.load_target / (problem.unit or 1.0)
    # Upper limit on how far any load, between 0 and C holders, is off target.
    farthest = max(
        float(problem.clients), float(target.max()), problem.clients - float(target.min())
    )
    # Upper limit on the value of a path of swaps, including balance and earlier prices.
    widest = look(problem).span + 2 * _curve(problem) * farthest
    path = 2.0 * (problem.experts + 1) * (widest + float(np.max(np.abs(base))))
    priority = np.asarray(problem.violation_weight / np.min(problem.violation_weight))
    priority = np.minimum(priority, _PRIORITY)
    quantum = float(np.max(priority)) * path / _DEAREST or 1.0
    low, high = count_bounds(problem)
    cost = LoadCost(
        low,
        high,
        # One unit out of bounds costs more than any path gains.
        np.rint(priority * max(path / quantum, 1.0)),
        np.rint(base / quantum),
        _curve(problem) / quantum,
        target,
    )
    # Column-major, the layout that `augment` needs, so that there are never two copies.
    fitness = np.array(view.worth, order="F")
    np.divide(fitness, quantum, out=fitness)
    return np.rint(fitness, out=fitness), cost, quantum


def _begin(problem: Problem, view: View, prices: FloatArray) -> _Start:
    """Lets clients choose at these prices on load."""
    fitness, cost, quantum = _whole(problem, view)
    whole = np.rint(prices * (problem.unit or 0.0) / quantum)
    held = best_choices(fitness, whole, problem.capacity)
    count = held.sum(axis=0).astype(np.float64)
    start = cost.start(whole, count)
    moves = float(np.maximum(count - start, 0.0).sum() + max(start.sum() - count.sum(), 0.0))
    return _Start(fitness, cost, whole, held, moves, quantum)


def _moves(problem: Problem, view: View, prices: FloatArray) -> float:
    """Computes how many holders must move after clients choose at these prices on load."""
    return _begin(problem, view, prices).moves


def prices_of(problem: Problem, assignment: BoolArray) -> Prices:
    """Computes prices from shortest distances; they prove an assignment [C, E] if it is optimal."""
    fitness, cost, quantum = _whole(problem, look(problem))
    load = assignment.sum(axis=0).astype(np.float64)
    prices = potentials(swap_costs(fitness, assignment), cost, load) * quantum
    return _per_load(problem, prices)


def _per_load(problem: Problem, prices: FloatArray) -> Prices:
    """Converts prices [E] per holder to prices on load, or on holders if the weight is zero."""
    if problem.unit:
        return Prices(prices / problem.unit)
    return Prices(np.zeros(problem.experts), holders=np.maximum(-prices, 0.0))


def _curve(problem: Problem) -> float:
    """Computes the balance cost of one squared holder off target."""
    return problem.balance * (problem.unit or 0.0) ** 2
