"""The convex relaxation of the assignment, solved through CVXPY.

    maximise Σ q_i x_i   over 0 ≤ x ≤ 1,   R x = k,   L_min ≤ W (w ∘ x) ≤ L_max

The variable `x` is flat, with one entry per pair. Two sparse matrices contain ones: `R` sums a
client's pairs, `W` an expert's. Memory is linear in C·E. Numbers are CVXPY parameters, so CVXPY
does not canonicalise a problem of the same shape again. If the load bounds cannot be met, a first
problem finds the smallest weighted violation, and a second one is limited to it. `solve_directly`
solves the same program without CVXPY, if it is linear and the bounds can be met.

Axis legend: `C` clients, `E` experts, `F` features in a client's descriptor.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexmoe_jax.assignment.backends import require_backend
from flexmoe_jax.assignment.certificate import Prices, effective_bounds
from flexmoe_jax.assignment.linear import Rows, maximise
from flexmoe_jax.assignment.problem import FloatArray, IntArray, Problem
from flexmoe_jax.assignment.program import (
    Found,
    Numbers,
    Program,
    all_pairs,
    solve_kept,
)
from flexmoe_jax.errors import InputError

# First-order solvers: accurate enough for load bounds, but too inexact for other terms.
_FIRST_ORDER = ("CUOPT", "OSQP", "PDLP", "SCS")
# Maximum pairs for weights as parameters: the canonical form then has at most 4096² numbers.
_FEW_PAIRS = 4096


class Relaxed(NamedTuple):
    """Optimum of the relaxation.

    Attributes:
      x: [C, E] fractions in [0, 1].
      prices: optimal prices; those of the elastic problem if the load bounds were relaxed.
      witness: prices that prove that the load bounds cannot be met; None if they can.
    """

    x: FloatArray
    prices: Prices
    witness: Prices | None


def solve_relaxation(
    problem: Problem, backend: str = "HIGHS", deadline: float = np.inf, direct: bool = False
) -> Relaxed:
    """Solves the relaxation; relaxes load bounds that contradict each other or the capacities.

    Args:
      problem: the problem to solve, in units near 1 (`rescale`).
      backend: any installed CVXPY solver; Clarabel replaces HiGHS for quadratic terms.
      deadline: on the `time.perf_counter` clock.
      direct: whether a linear program may go to HiGHS directly, without CVXPY.

    Raises:
      InputError: the CVXPY solver is not installed or does not support such problems; or it is a
        first-order solver, and the problem has terms for which it is too inexact.
      SolverError: the CVXPY solver failed, or the deadline passed.
    """
    require_backend(backend)
    clients, experts = problem.fitness.shape
    if clients == 0:
        return Relaxed(np.zeros((0, experts)), Prices(np.zeros(experts)), None)
    low, high = effective_bounds(problem)
    # With one weight for all pairs, the load bounds already include the floors.
    floors = bool(np.any(problem.holders_min)) and not problem.unit
    extended = bool(problem.diversity or problem.balance) or problem.expert_size is not None
    if (extended or floors) and backend in _FIRST_ORDER:
        terms = "balance, diversity, sizes or weighted floors"
        raise InputError("assignment.backend", backend, f"too inexact for {terms}; use HIGHS")
    unit = 1.0 if extended or not problem.unit else problem.unit
    fitness, sides = problem.fitness.ravel(), (low / unit, high / unit)
    found = None
    if direct and backend == "HIGHS" and not (extended or floors):
        pairs, weights = all_pairs(clients, experts), problem.weights.ravel() / unit
        found = solve_directly(*pairs, weights, fitness, problem.capacity, *sides, deadline)
    if found is None:
        numbers = Numbers(
            fitness,
            problem.capacity,
            *sides,
            np.asarray(problem.holders_min),
            np.asarray(problem.violation_weight),
        )
        found = _solve_program(problem, numbers, floors, extended, backend, deadline)
    x = np.clip(found.x, 0.0, 1.0).reshape(clients, experts)
    prices = found.prices._replace(load=found.prices.load / unit)
    if problem.balance:
        # The slope of the quadratic balance term is also part of the price.
        off = (problem.weights * x).sum(axis=0) - problem.load_target
        prices = prices._replace(load=prices.load + 2 * problem.balance * off)
    return Relaxed(x, prices, found.witness)


def _solve_program(
    problem: Problem,
    numbers: Numbers,
    floors: bool,
    extended: bool,
    backend: str,
    deadline: float,
) -> Found:
    """Solves with CVXPY; caches a program without extra terms if small or of equal weights."""
    clients, experts = problem.fitness.shape
    if not extended:
        if problem.unit:
            return solve_kept(clients, experts, floors, backend, numbers, deadline)
        if clients * experts <= _FEW_PAIRS:
            numbers = numbers._replace(weight=problem.weights.ravel())
            return solve_kept(clients, experts, floors, backend, numbers, deadline)
    program = Program(
        *all_pairs(clients, experts),
        clients,
        experts,
        weight=problem.weights.ravel(),
        floors=floors,
        extras=problem if extended else None,
    )
    found = program.solve(backend, numbers, deadline)
    assert found is not None
    return found


def solve_directly(
    client: IntArray,
    expert: IntArray,
    weight: FloatArray,
    fitness: FloatArray,
    capacity: FloatArray | IntArray,
    low: FloatArray,
    high: FloatArray,
    deadline: float = np.inf,
) -> Found | None:
    """Solves the relaxation over given pairs without CVXPY; None if the bounds cannot be met.

    Args:
      client: client of each pair.
      expert: expert of each pair.
      weight: load of each pair.
      fitness: fitness of each pair.
      capacity: capacity of each client.
      low: minimum load of each expert.
      high: maximum load of each expert.
      deadline: on the `time.perf_counter` clock.
    """
    full, balanced = Rows(client, 1.0, capacity, capacity), Rows(expert, weight, low, high)
    optimum = maximise(fitness, full, balanced, deadline=deadline)
    if optimum is None:
        return None
    return Found(optimum.x, optimum.value, Prices(optimum.prices[1]))
