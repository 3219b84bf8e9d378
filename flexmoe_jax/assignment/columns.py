"""The relaxation of large problems: the solver gets only the pairs that are in doubt.

At good prices nearly every pair is decided: its worth is far above its client's threshold, or far
below. The other pairs form a small linear program. Its optimal prices then prove how good the
answer is on *all* pairs (`certificate.price_bound`). While a gap remains, the set of pairs in doubt
grows. (This is column generation, Dantzig and Wolfe 1960, with columns chosen by reduced cost.)

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from flexmoe_jax.assignment.certificate import Prices, effective_bounds, price_bound
from flexmoe_jax.assignment.closer import View, look, look_closer
from flexmoe_jax.assignment.heuristics import take_top
from flexmoe_jax.assignment.paths import GOLDEN, spread_ties
from flexmoe_jax.assignment.problem import BoolArray, FloatArray, Problem, expert_load
from flexmoe_jax.assignment.program import Found, Numbers, Program
from flexmoe_jax.assignment.rebalance import rebalance
from flexmoe_jax.assignment.relaxation import Relaxed, solve_directly

# Pairs in doubt per expert in the first attempt, their growth factor, and number of attempts.
_PAIRS_PER_EXPERT, _GROWTH, _ATTEMPTS = 40, 4, 3
# Accepted gap between bound and value, as a fraction of the summed spans of the fitness rows.
_CLOSED = 1e-7
# Fraction of the total load that may be outside its bounds at good prices.
_MISS = 0.01


def solve_by_columns(
    problem: Problem,
    prices: FloatArray,
    backend: str = "HIGHS",
    deadline: float = np.inf,
    direct: bool = False,
    start: BoolArray | None = None,
) -> Relaxed:
    """Solves the relaxation without diversity, balance, expert sizes or weighted floors.

    Args:
      problem: the problem to solve.
      prices: [E] good prices on load, which determine the pairs in doubt.
      backend: any installed CVXPY solver.
      deadline: on the `time.perf_counter` clock.
      direct: whether the program may go to HiGHS directly, without CVXPY.
      start: [C, E] bool, an assignment that is best at these prices and within the bounds.

    Returns:
      The same as `solve_relaxation`. If bounds are relaxed, the violation is the smallest among
      solutions that keep the decided pairs.

    Raises:
      SolverError: the backend failed, or the deadline passed.
    """
    low, high = effective_bounds(problem)
    total = float(np.sum(problem.weights.mean(axis=1) * problem.capacity))
    view, direct = look(problem), direct and backend == "HIGHS"
    if start is None:
        misses = partial(_misses, problem, (low, high))
        view, prices = look_closer(problem, prices, misses, _MISS * total, deadline)
    worth = _whole(problem, view, prices)
    top = take_top(worth, problem.capacity) if start is None else start
    prices = view.base + prices
    given = price_bound(problem, Prices(prices), low, high)
    attempt, balanced = 0, start is not None
    while attempt < _ATTEMPTS:
        last = attempt == _ATTEMPTS - 1
        in_doubt = _in_doubt(worth, top, _PAIRS_PER_EXPERT * _GROWTH**attempt)
        decided = top & ~in_doubt
        client, expert = np.nonzero(in_doubt)
        pairs = client, expert
        found = _solve_pairs(problem, pairs, decided, (low, high), backend, deadline, direct, last)
        if found is None and not balanced:
            # The decided pairs make it impossible to meet the bounds.
            top, balanced = rebalance(problem, worth, top, low, high), True
            continue
        attempt += 1
        if found is None:
            continue
        value = found.value + float(problem.fitness[decided].sum())
        bound = price_bound(problem, found.prices, low, high)
        closed = bound - value <= _CLOSED * float(np.ptp(problem.fitness, axis=1).sum())
        if found.witness is not None or closed:
            break
    assert found is not None
    x = decided.astype(np.float64)
    x[pairs] = np.clip(found.x, 0.0, 1.0)
    better = found.witness is not None or bound <= given
    return Relaxed(x, found.prices if better else Prices(prices), found.witness)


def _whole(problem: Problem, view: View, prices: FloatArray) -> FloatArray:
    """Computes the worth [C, E] minus these prices.

    The result is rounded to whole numbers, so that ties are exact. Fractions below one are then
    added, which spread tied clients over the experts.
    """
    reduced = view.worth - problem.weights * prices
    return spread_ties(np.rint(reduced * (2.0**32 / (view.span or 1.0))))


def _misses(
    problem: Problem,
    bounds: tuple[FloatArray, FloatArray],
    view: View,
    prices: FloatArray,
) -> float:
    """Computes how much load is outside its bounds if clients choose at these prices."""
    low, high = bounds
    load = expert_load(problem, take_top(_whole(problem, view, prices), problem.capacity))
    return float(np.maximum(np.maximum(low - load, load - high), 0.0).sum())


def _in_doubt(worth: FloatArray, top: BoolArray, wanted: int) -> BoolArray:
    """Selects the pairs [C, E] most in doubt, `wanted` per expert and side, and swap partners.

    A pair is in doubt if its worth is near its client's threshold. Every expert gets pairs, because
    any expert may have to give or take load, at any cost. Among equal doubts, pairs of the same
    client are kept together, because a client with one pair in doubt cannot change anything.
    """
    whole = np.floor(worth)
    worst_in = np.min(whole, axis=1, where=top, initial=np.inf)
    best_out = np.max(whole, axis=1, where=~top, initial=-np.inf)
    threshold = np.where(
        np.isfinite(worst_in) & np.isfinite(best_out),
        0.5 * (worst_in + best_out),
        np.where(np.isfinite(worst_in), -np.inf, np.inf),
    )
    turn = np.arange(worth.shape[0]) * GOLDEN
    doubt = np.abs(whole - threshold[:, None]) + 0.25 * (turn - np.floor(turn))[:, None]
    last = min(wanted, worth.shape[0]) - 1
    found = np.zeros(worth.shape, bool)
    for side in (top, ~top):
        of_side = np.where(side, doubt, np.inf)
        nearest = np.argpartition(of_side, last, axis=0)[: last + 1]
        np.put_along_axis(found, nearest, True, axis=0)
    some = found.any(axis=1)
    found[some, np.argmin(np.where(top, worth, np.inf), axis=1)[some]] = True
    found[some, np.argmax(np.where(top, -np.inf, worth), axis=1)[some]] = True
    return found


def _solve_pairs(
    problem: Problem,
    pairs: tuple[Any, Any],
    decided: BoolArray,
    bounds: tuple[FloatArray, FloatArray],
    backend: str,
    deadline: float,
    direct: bool,
    give_way: bool,
) -> Found | None:
    """Solves the relaxation over the pairs in doubt; None if they cannot meet the bounds."""
    client, expert = pairs
    owners, owner = np.unique(client, return_inverse=True)
    base = expert_load(problem, decided)
    weight, fitness = problem.weights[pairs], problem.fitness[pairs]
    capacity = (problem.capacity - decided.sum(axis=1))[owners]
    low, high = bounds[0] - base, bounds[1] - base
    if direct:
        found = solve_directly(owner, expert, weight, fitness, capacity, low, high, deadline)
        if found is not None or not give_way:
            return found
    program = Program(owner, expert, owners.size, problem.experts, weight=weight)
    zeros, priority = np.zeros(problem.experts), np.asarray(problem.violation_weight)
    numbers = Numbers(fitness, capacity, low, high, zeros, priority)
    return program.solve(backend, numbers, deadline, give_way)
