"""Exact assignments under equal weights by OR-Tools' minimum-cost flow.

    source -> client (supply k_c) -> expert (one arc a pair, capacity 1, cost -Q) -> sink

with load bounds on the arcs to the sink, and dear arcs beside them for loads out of bounds. Costs
are whole numbers: fitness is scaled by the largest factor that keeps the solver's sums within 64
bits, and rounding moves the value by at most half a step a held pair.

Needs the extra `flow` (OR-Tools), which runs in processes of its own (`worker.py`): its copy of
HiGHS and the one that CVXPY uses carry the same library name, so one process can load only one.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

import importlib.util

import numpy as np

from flexmoe_jax.assignment.certificate import count_bounds
from flexmoe_jax.assignment.problem import BoolArray, Problem
from flexmoe_jax.assignment.worker import ask
from flexmoe_jax.errors import InputError

# Costs times nodes must stay within 64 bits.
_LARGEST_SUM = 2.0**60
_FINEST = 2.0**40
# What one unit of violation may weigh more than another: more would leave fitness no digits.
_PRIORITY = 1024.0


def require_ortools() -> None:
    """Raises `InputError` where OR-Tools is not installed."""
    if importlib.util.find_spec("ortools") is None:
        raise InputError(
            "assignment.solver", "flow", "needs OR-Tools: pip install 'flexmoe_jax[flow]'"
        )


def solve_flow(problem: Problem, deadline: float = np.inf) -> BoolArray:
    """Solves a problem whose pairs all have one weight.

    Args:
      problem: what to solve.
      deadline: on the clock of `time.perf_counter`.

    Returns:
      [C, E] bool, as OR-Tools answered: check what it is worth.

    Raises:
      InputError: OR-Tools is not installed.
      SolverError: OR-Tools failed, or the deadline passed.
    """
    require_ortools()
    clients, experts = problem.fitness.shape
    total = int(problem.capacity.sum())
    if total == 0:
        return np.zeros((clients, experts), bool)
    low, high = (np.clip(end, 0, total).astype(np.int64) for end in count_bounds(problem))
    centred = problem.fitness - problem.fitness.mean(axis=1, keepdims=True)
    span = float(np.max(np.abs(centred))) or 1.0
    weight = np.asarray(problem.violation_weight) / np.min(problem.violation_weight)
    weight = np.minimum(weight, _PRIORITY)
    # One unit of violation outweighs any path of swaps, of which each costs at most 2 spans.
    dear = 2.0 * (experts + 1)
    room = _LARGEST_SUM / ((clients + experts + 2) * 2 * dear * float(weight.max()))
    scale = min(_FINEST, room) / span
    return ask(
        np.rint(-centred * scale).astype(np.int64),
        problem.capacity.astype(np.int64),
        low,
        high,
        np.rint(dear * span * scale * weight).astype(np.int64),
        deadline=deadline,
    )
