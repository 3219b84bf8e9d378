"""Exact assignments under equal weights by OR-Tools' minimum-cost flow.

    source -> client (supply k_c) -> expert (one arc a pair, capacity 1, cost -Q) -> sink

The arcs to the sink carry the load bounds. Parallel arcs with a high cost take loads out of bounds.
Costs are whole numbers: fitness is scaled by the largest factor that keeps the solver's sums within
64 bits. Rounding changes the value by at most half a step per held pair.

Needs the extra `flow` (OR-Tools), which runs in separate processes (`worker.py`): its copy of HiGHS
and the one that CVXPY uses have the same library name, so one process can load only one of them.

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
# Largest ratio between two violation weights: a larger one would leave too few digits for fitness.
_PRIORITY = 1024.0


def require_ortools() -> None:
    """Raises `InputError` if OR-Tools is not installed."""
    if importlib.util.find_spec("ortools") is None:
        raise InputError(
            "assignment.solver", "flow", "needs OR-Tools: pip install 'flexmoe_jax[flow]'"
        )


def solve_flow(problem: Problem, deadline: float = np.inf) -> BoolArray:
    """Solves a problem whose pairs all have one weight.

    Args:
      problem: the problem to solve.
      deadline: on the `time.perf_counter` clock.

    Returns:
      [C, E] bool, the answer of OR-Tools; the caller must check it.

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
    # One unit of violation costs more than any path of swaps, each of which costs at most 2 spans.
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
