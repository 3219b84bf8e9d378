"""Moves loads into their bounds by single swaps, many clients at a time, cheapest first.

The result is a starting point for other algorithms. The search is greedy: it does not consider that
a more expensive swap may save cost later, and it stops when no single swap helps.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

import numpy as np

from flexmoe_jax.assignment.problem import BoolArray, FloatArray, IntArray, Problem, expert_load

# Maximum number of rounds; loads that are then out of bounds stay so.
_ROUNDS = 100


def rebalance(
    problem: Problem, worth: FloatArray, held: BoolArray, low: FloatArray, high: FloatArray
) -> BoolArray:
    """Moves load from experts that have too much, or to those that have too little.

    Args:
      problem: the problem, for its weights.
      worth: [C, E] worth of each pair, which determines the cost of a swap.
      held: [C, E] bool, the starting point; not modified.
      low: [E] minimum load.
      high: [E] maximum load.

    Returns:
      [C, E] bool; no expert's violation is larger than before.
    """
    held = held.copy()
    rows = np.arange(problem.clients)
    for _ in range(_ROUNDS):
        load = expert_load(problem, held)
        over, under = load > high, load < low
        if not (over.any() or under.any()):
            break
        # Overloaded experts give first, to all that have room. Then all that can spare load give.
        gives, takes = (over, load < high) if over.any() else (load > low, under)
        leaves = held & gives & (load - problem.weights >= low)
        enters = ~held & takes & (load + problem.weights <= high)
        leaving = np.where(leaves, worth, np.inf)
        entering = np.where(enters, worth, -np.inf)
        source, target = leaving.argmin(axis=1), entering.argmax(axis=1)
        cost = leaving[rows, source] - entering[rows, target]
        order = np.argsort(cost, kind="stable")
        order = order[: np.count_nonzero(np.isfinite(cost))]
        source, target = source[order], target[order]
        out, into = problem.weights[order, source], problem.weights[order, target]
        left, entered = _running(source, out), _running(target, into)
        spare = (load - (high if over.any() else low))[source]
        room = ((high if over.any() else low) - load)[target]
        # The swap that crosses a bound is the last one, unless it would cross the opposite bound.
        accept = (left - out < spare) & (entered - into < room)
        accept &= (left <= (load - low)[source]) & (entered <= (high - load)[target])
        if not accept.any():
            break
        held[order[accept], source[accept]] = False
        held[order[accept], target[accept]] = True
    return held


def _running(group: IntArray, amount: FloatArray) -> FloatArray:
    """Computes the running sum of the amounts within each group."""
    order = np.argsort(group, kind="stable")
    total = np.cumsum(amount[order])
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    before = np.repeat(total[first] - amount[order][first], np.diff(np.append(first, group.size)))
    running = np.empty_like(total)
    running[order] = total - before
    return running
