"""`solve`: a single entry point to all solvers.

Axis legend: `C` clients, `E` experts, `F` features in a client's descriptor.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from flexmoe_jax.assignment.certificate import Prices, gave_way, prove, require_capacities
from flexmoe_jax.assignment.columns import solve_by_columns
from flexmoe_jax.assignment.equal import prices_of, solve_paths
from flexmoe_jax.assignment.flow import require_ortools, solve_flow
from flexmoe_jax.assignment.heuristics import (
    client_keys,
    take_best,
    take_in_turn,
    take_random,
    take_top,
)
from flexmoe_jax.assignment.loading import load
from flexmoe_jax.assignment.polish import polish
from flexmoe_jax.assignment.prices import estimate_prices
from flexmoe_jax.assignment.problem import (
    BoolArray,
    Problem,
    SolverError,
    expert_load,
    load_violation,
    missing_holders,
    objective,
)
from flexmoe_jax.assignment.relaxation import Relaxed, solve_relaxation
from flexmoe_jax.assignment.rounding import round_knapsack, round_shmoys_tardos
from flexmoe_jax.assignment.scaling import rescale
from flexmoe_jax.assignment.solution import Solution, make_solution
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.assignment import AssignmentOptions

# Problem terms that a solver does not support; `relaxation` and `auto` support all.
_REFUSED = MappingProxyType(
    {
        "paths": ("weights that differ", "diversity", "sizes"),
        "flow": ("weights that differ", "balance", "diversity", "sizes"),
        "dual": ("balance", "sizes", "holders_min where weights differ"),
        "greedy": ("sizes",),
        "random": ("sizes",),
        "round_robin": ("sizes",),
    }
)
# Value that repairing the load bounds may cost, as a fraction of the stake (`_stake`).
_MENDING = MappingProxyType({"shmoys_tardos": 0.0, "repair": 0.02})
ROUNDINGS = tuple(_MENDING)
# Gaps at or below which local search is skipped, for large problems and for small ones.
_GOOD, _CLOSED = 1e-3, 1e-9
# Number of pairs up to which it is faster to solve the relaxation over all pairs.
_MANY_PAIRS = 20_000


_jax_is_lost = False


def _note_jax() -> None:
    """Records in a forked process that JAX ran: its threads are gone, so waiting for them hangs."""
    global _jax_is_lost
    bridge = sys.modules.get("jax._src.xla_bridge")
    _jax_is_lost |= bridge is not None and bool(getattr(bridge, "_backends", True))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_jax)


class Options(NamedTuple):
    """Options of `solve` for a solver; the deadline is on the `time.perf_counter` clock."""

    rounding: str = "repair"
    seed: int = 0
    backend: str = "HIGHS"
    deadline: float = np.inf


class _Answer(NamedTuple):
    """The answer of a solver; `solve` verifies it independently.

    Attributes:
      assignment: [C, E] bool.
      prices: one or more sets of prices; each proves a bound. Empty means prices of zero.
      witness: prices that prove that the load bounds cannot be met, if the proof needs prices.
    """

    assignment: BoolArray
    prices: tuple[Prices, ...] = ()
    witness: Prices | None = None


def solve(
    problem: Problem,
    solver: str = AssignmentOptions.solver,
    rounding: str = "repair",
    seed: int = 0,
    backend: str = "HIGHS",
    time_limit: float = 0.0,
) -> Solution:
    """Solves an assignment problem.

    Args:
      problem: the problem to solve.
      solver: a name in `SOLVERS`. `auto`, the default, chooses: `paths` (exact, NumPy) for equal
        weights, else `relaxation` (CVXPY and HiGHS), which supports every problem, or `dual` (JAX)
        for large ones with diversity. `flow` (exact, OR-Tools) needs equal weights; the heuristics
        `greedy`, `random` and `round_robin` ignore the load bounds.
      rounding: how fractions are rounded. Both methods keep capacities exactly, and load bounds to
        within an expert's largest single weight. `shmoys_tardos` reaches at least the value of the
        relaxation. `repair` (the default) gives up at most 2 % of the value that is at stake to
        repair load bounds.
      seed: seed for ties and random choices.
      backend: CVXPY solver for the relaxation: any installed one, by CVXPY's name
        (`cvxpy.installed_solvers()`). An interior-point or first-order solver is only as accurate
        as its tolerance; the certificate shows the accuracy reached.
      time_limit: seconds after which the search for the optimum stops; 0 for no limit. Rounding,
        local search, `dual` and the heuristics take a bounded number of steps and ignore it.

    Returns:
      The assignment with its certificate. If the load bounds cannot all be met, they are relaxed
      with the smallest weighted violation, and the solution reports which ones.

    Raises:
      InputError: unknown solver, rounding or backend, or one that does not support the problem.
      SolverError: the solver failed or the time ran out. Never because of the bounds.
    """
    require_name("assignment.solver", solver, SOLVERS)
    require_name("assignment.rounding", rounding, ROUNDINGS)
    if not time_limit >= 0:
        raise InputError("assignment.time_limit", time_limit, "give seconds, or 0 for no limit")
    require_solver(
        solver,
        weighted=problem.unit is None,
        balance=bool(problem.balance),
        diversity=bool(problem.diversity),
        sizes=problem.expert_size is not None,
        floors=bool(np.any(problem.holders_min)),
    )
    begin = time.perf_counter()
    deadline = begin + (time_limit or np.inf)
    scaled, exponent = rescale(problem)
    answer = SOLVERS[solver](scaled, Options(rounding, seed, backend, deadline))
    held = answer.assignment
    require_capacities(scaled, held)
    broken = load_violation(scaled, expert_load(scaled, held)).any()
    broken |= missing_holders(scaled, held).any()
    relaxed = bool(broken) and gave_way(scaled, held, answer.witness)
    # The scaled problem gives the difference between bound and value more exactly.
    above = prove(scaled, held, answer.prices, relaxed) - objective(scaled, held)
    bound = _bound(problem, held, float(np.ldexp(above, exponent)), relaxed)
    return make_solution(problem, held, bound, time.perf_counter() - begin, relaxed=relaxed)


def _bound(problem: Problem, held: BoolArray, above: float, relaxed: bool) -> float:
    """Bound at `above` over the value; where bounds gave way, at most the best without any.

    Prices of load bounds that cannot be met may grow without limit.
    """
    value = objective(problem, held)
    if not relaxed or problem.expert_size is not None:
        return value + above
    free = np.sum(problem.fitness, where=take_top(problem.fitness, problem.capacity))
    return min(value + above, max(float(free), value))


def require_solver(
    solver: str,
    *,
    weighted: bool = False,
    balance: bool = False,
    diversity: bool = False,
    sizes: bool = False,
    floors: bool = False,
) -> None:
    """Raises `InputError` if a solver does not support problems with these terms.

    Args:
      solver: a name in `SOLVERS`.
      weighted: whether load weights differ from pair to pair.
      balance: whether there is a balance term.
      diversity: whether there is a diversity term.
      sizes: whether experts have sizes.
      floors: whether experts need a minimum number of holders.
    """
    terms = {
        "weights that differ": weighted,
        "balance": balance,
        "diversity": diversity,
        "sizes": sizes,
        "holders_min where weights differ": floors and weighted,
    }
    refused = " and no ".join(term for term in _REFUSED.get(solver, ()) if terms[term])
    if refused:
        raise InputError("assignment.solver", solver, f"takes no {refused}; use auto")
    if solver == "flow":
        require_ortools()


def require_name(field: str, name: str, known: Iterable[str]) -> None:
    """Raises `InputError` for an unknown name and suggests the closest known one."""
    names = sorted(known)
    if name in names:
        return
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(field, name, f"{hint}give one of {', '.join(names)}")


def _relaxation(problem: Problem, options: Options, direct: bool = False) -> _Answer:
    plain = not (problem.balance or problem.diversity or problem.expert_size is not None)
    floors = bool(np.any(problem.holders_min)) and not problem.unit
    if plain and not floors and problem.fitness.size > _MANY_PAIRS:
        relaxed = _relax_pairs_in_doubt(problem, options, direct)
    else:
        relaxed = solve_relaxation(problem, options.backend, options.deadline, direct)
    if problem.expert_size is not None:
        held = round_knapsack(problem, relaxed.x)
    else:
        held = round_shmoys_tardos(problem, relaxed.x)
    answer = _Answer(held, (relaxed.prices,), relaxed.witness)
    return _polished(problem, answer, options.rounding)


def _relax_pairs_in_doubt(problem: Problem, options: Options, direct: bool) -> Relaxed:
    if problem.unit:
        # With equal weights, `solve_paths` finds optimal prices and their assignment directly.
        start, best = solve_paths(problem, options.deadline)
        return solve_by_columns(
            problem, best.load, options.backend, options.deadline, direct, start
        )
    prices = estimate_prices(problem)
    return solve_by_columns(problem, prices, options.backend, options.deadline, direct)


def _paths(problem: Problem, options: Options) -> _Answer:
    held, prices = solve_paths(problem, options.deadline)
    return _Answer(held, (prices,))


def _flow(problem: Problem, options: Options) -> _Answer:
    held = solve_flow(problem, options.deadline)
    require_capacities(problem, held)
    # Compute our own prices, so that the bound does not rely on OR-Tools.
    return _Answer(held, (prices_of(problem, held),))


def _dual(problem: Problem, options: Options) -> _Answer:
    if problem.clients == 0 or problem.unit == 0:
        return _relaxation(problem, options)
    if _jax_is_lost:
        remedy = "start processes by spawn, or use auto"
        raise SolverError(f"dual: JAX ran before this process was forked off; {remedy}")
    # Only this solver needs JAX, so it is imported here.
    load("jax.numpy")
    from flexmoe_jax.assignment.device import run_dual

    found = run_dual(problem)
    return _polished(problem, _Answer(found.assignment, (found.prices,)), options.rounding)


def _polished(problem: Problem, answer: _Answer, rounding: str) -> _Answer:
    """Runs local search if it can help: load bounds are violated, or there is a gap."""
    held = answer.assignment
    value = objective(problem, held)
    bound = prove(problem, held, answer.prices, answer.witness is not None)
    stake = _stake(problem, held, bound)
    broken = load_violation(problem, expert_load(problem, held)).any()
    good = _GOOD if problem.fitness.size > _MANY_PAIRS else _CLOSED
    if not broken and bound - value <= good * stake:
        return answer
    least = min(value, bound - _MENDING[rounding] * stake) if broken else value
    return answer._replace(assignment=polish(problem, held, answer.prices[0].load, least))


def _stake(problem: Problem, held: BoolArray, bound: float) -> float:
    """Computes the value at stake from each row's span, so that row constants do not count."""
    if problem.expert_size is not None:
        return abs(bound)
    span = np.ptp(problem.fitness, axis=1) if problem.clients else np.zeros(0)
    swaps = np.minimum(problem.capacity, problem.experts - problem.capacity)
    terms = float(problem.fitness[held].sum()) - objective(problem, held)
    return float(np.sum(span * swaps)) + terms


def _auto(problem: Problem, options: Options) -> _Answer:
    if problem.expert_size is not None:
        return _relaxation(problem, options)
    if problem.unit is not None and not problem.diversity:
        return _paths(problem, options)
    floors = bool(np.any(problem.holders_min)) and not problem.unit
    many = problem.fitness.size > _MANY_PAIRS and not _jax_is_lost
    if problem.diversity and not problem.balance and not floors and many:
        return _dual(problem, options)
    return _relaxation(problem, options, direct=True)


def _greedy(problem: Problem, options: Options) -> _Answer:
    keys = client_keys([options.seed], np.arange(problem.clients), problem.experts)
    return _Answer(take_best(problem.fitness, problem.capacity, keys))


def _random(problem: Problem, options: Options) -> _Answer:
    keys = client_keys([options.seed], np.arange(problem.clients), problem.experts)
    return _Answer(take_random(problem.capacity, keys))


def _round_robin(problem: Problem, options: Options) -> _Answer:
    clients = np.arange(problem.clients)
    return _Answer(take_in_turn(problem.capacity, clients, 0, problem.experts))


SOLVERS: MappingProxyType[str, Callable[[Problem, Options], _Answer]] = MappingProxyType(
    {
        "auto": _auto,
        "dual": _dual,
        "flow": _flow,
        "greedy": _greedy,
        "paths": _paths,
        "random": _random,
        "relaxation": _relaxation,
        "round_robin": _round_robin,
    }
)
