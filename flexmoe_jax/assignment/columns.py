"""The relaxation of large problems: the solver sees only the pairs that are in doubt.

At good prices nearly every pair is decided: worth far more than its client's threshold, or far
less. The rest make a small linear program, solved like any other. Its optimal prices
then prove how good the answer is on *all* pairs (`certificate.price_bound`); while the proof
leaves a gap, more pairs count as being in doubt (column generation, Dantzig and Wolfe 1960, with
its columns chosen by reduced cost).

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

# Pairs in doubt at first, an expert; and how many times more in each further attempt.
_PAIRS_PER_EXPERT, _GROWTH, _ATTEMPTS = 40, 4, 3
# Part of what is at stake by which the proof may miss the optimum.
_CLOSED = 1e-7
# Part of all load that may be out of its bounds where good prices send it.
_MISS = 0.01


def solve_by_columns(
    problem: Problem,
    prices: FloatArray,
    backend: str = "HIGHS",
    deadline: float = np.inf,
    direct: bool = False,
    start: BoolArray | None = None,
) -> Relaxed:
    """Relaxation of a problem without diversity, balance, expert sizes or weighted floors.

    Args:
      problem: what to solve.
      prices: [E] good prices on load, from which the pairs in doubt follow.
      backend: any CVXPY solver that is installed.
      deadline: on the clock of `time.perf_counter`.
      direct: whether HiGHS may be given the program without CVXPY.
      start: [C, E] bool, an assignment that is best at these prices and within the bounds.

    Returns:
      As `solve_relaxation`. Where bounds give way, the violation is the least among answers that
      keep to the decided pairs.

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
            # What is decided leaves no room for the bounds.
            top, balanced = rebalance(problem, worth, top, low, high), True
            continue
        attempt += 1
        if found is None:
            continue
        value = found.value + float(np.sum(problem.fitness, where=decided))
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
    """What is left of the worth [C, E] at these prices.

    In whole numbers, so that ties are ties, and parts of one that spread them over the experts.
    """
    reduced = view.worth - problem.weights * prices
    return spread_ties(np.rint(reduced * (2.0**32 / (view.span or 1.0))))


def _misses(
    problem: Problem,
    bounds: tuple[FloatArray, FloatArray],
    view: View,
    prices: FloatArray,
) -> float:
    """How much load lies out of its bounds where these prices send it."""
    low, high = bounds
    load = expert_load(problem, take_top(_whole(problem, view, prices), problem.capacity))
    return float(np.maximum(np.maximum(low - load, load - high), 0.0).sum())


def _in_doubt(worth: FloatArray, top: BoolArray, wanted: int) -> BoolArray:
    """The pairs [C, E] most in doubt, so many of each expert, and what their clients swap them for.

    In doubt is what is worth little more or less than a client's threshold. Of each expert, since
    any of them may have to give or take load, whatever it costs; among equal doubts clients stay
    together, since one with one pair in doubt can change nothing.
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
    """The relaxation over the pairs in doubt; None where that leaves no room for the bounds."""
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
