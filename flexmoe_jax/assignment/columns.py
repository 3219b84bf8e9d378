"""The relaxation of large problems: the solver sees only the pairs that are in doubt.

At good prices nearly every pair is decided: worth far more than its client's threshold, or far
less. The rest make a small linear program, solved like any other. Its optimal prices
then prove how good the answer is on *all* pairs (`certificate.price_bound`); while the proof
leaves a gap, more pairs count as being in doubt (column generation, Dantzig and Wolfe 1960, with
its columns chosen by reduced cost).

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

import numpy as np

from flexmoe_jax.assignment.certificate import effective_bounds, price_bound
from flexmoe_jax.assignment.heuristics import take_top
from flexmoe_jax.assignment.problem import FloatArray, Problem, expert_load
from flexmoe_jax.assignment.relaxation import Program, Relaxed, solve_directly

# Pairs in doubt at first, an expert; and how many times more in each further attempt.
_PAIRS_PER_EXPERT, _GROWTH, _ATTEMPTS = 80, 4, 3
_CLOSED = 1e-7


def solve_by_columns(
    problem: Problem,
    prices: FloatArray,
    backend: str = "HIGHS",
    deadline: float = np.inf,
    direct: bool = False,
) -> Relaxed:
    """Relaxation of a problem without diversity, balance, expert sizes or weighted floors.

    Args:
      problem: what to solve.
      prices: [E] good prices on load, from which the pairs in doubt follow.
      backend: any CVXPY solver that is installed.
      deadline: on the clock of `time.perf_counter`.
      direct: whether HiGHS may be given the program without CVXPY.

    Returns:
      As `solve_relaxation`. Where bounds give way, the violation is the least among answers that
      keep to the decided pairs.

    Raises:
      SolverError: the backend failed, or the deadline passed.
    """
    direct = direct and backend == "HIGHS"
    experts = problem.experts
    low, high = effective_bounds(problem)
    reduced = problem.fitness - problem.weights * prices
    top = take_top(reduced, problem.capacity)
    worst_in = np.min(reduced, axis=1, where=top, initial=np.inf)
    best_out = np.max(reduced, axis=1, where=~top, initial=-np.inf)
    threshold = np.where(
        np.isfinite(worst_in) & np.isfinite(best_out),
        0.5 * (worst_in + best_out),
        np.where(np.isfinite(worst_in), -np.inf, np.inf),
    )
    doubt = np.abs(reduced - threshold[:, None])
    found, decided = None, top
    for attempt in range(_ATTEMPTS):
        wanted = _PAIRS_PER_EXPERT * experts * _GROWTH**attempt
        open_pairs = (
            doubt
            <= np.partition(doubt.ravel(), min(wanted, doubt.size - 1))[min(wanted, doubt.size - 1)]
        )
        decided = top & ~open_pairs
        client, expert = np.nonzero(open_pairs)
        owners, owner = np.unique(client, return_inverse=True)
        base = expert_load(problem, decided)
        weight = problem.weights[client, expert]
        fitness = problem.fitness[client, expert]
        capacity = (problem.capacity - decided.sum(axis=1))[owners]
        last = attempt == _ATTEMPTS - 1
        found = None
        if direct:
            sides = capacity, low - base, high - base
            found = solve_directly(owner, expert, weight, fitness, *sides, deadline)
        if not direct or (last and found is None):
            program = Program(owner, expert, owners.size, experts, weight=weight)
            found = program.solve(
                backend,
                fitness=fitness,
                capacity=capacity,
                low=low - base,
                high=high - base,
                holders=np.zeros(experts),
                violation_weight=np.asarray(problem.violation_weight),
                give_way=last,
                deadline=deadline,
            )
        if found is None or not np.isfinite(found.excess):
            continue
        worth = found.value + float(np.sum(problem.fitness, where=decided))
        bound = price_bound(problem, found.prices, low, high)
        x = decided.astype(np.float64)
        x[client, expert] = np.clip(found.x, 0.0, 1.0)
        if found.excess > 0 or bound - worth <= _CLOSED * max(1.0, abs(worth)):
            break
    assert found is not None
    if found.excess == 0:
        bound = min(bound, price_bound(problem, prices, low, high))
    return Relaxed(x, found.prices, bound, found.excess)
