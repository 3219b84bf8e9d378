"""`solve`: one call for every solver.

Axis legend: `C` clients, `E` experts, `F` numbers that describe a client.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from flexmoe_jax.assignment.certificate import (
    effective_bounds,
    has_impossible_bounds,
    price_bound,
)
from flexmoe_jax.assignment.columns import solve_by_columns
from flexmoe_jax.assignment.flow import require_ortools, solve_flow
from flexmoe_jax.assignment.heuristics import (
    client_keys,
    take_best,
    take_in_turn,
    take_random,
    take_top,
)
from flexmoe_jax.assignment.paths import augment
from flexmoe_jax.assignment.polish import polish
from flexmoe_jax.assignment.prices import estimate_prices
from flexmoe_jax.assignment.problem import (
    BoolArray,
    FloatArray,
    Problem,
    Solution,
    expert_load,
    load_violation,
    make_solution,
    objective,
)
from flexmoe_jax.assignment.relaxation import solve_relaxation
from flexmoe_jax.assignment.rounding import round_knapsack, round_shmoys_tardos
from flexmoe_jax.errors import InputError

# Terms of a problem that solvers do not take; `relaxation` and `auto` take all.
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
# Part of the relaxation's value that mending the load bounds may cost.
_MENDING = MappingProxyType({"shmoys_tardos": 0.0, "repair": 0.01})
ROUNDINGS = tuple(_MENDING)
# Gaps at which local search is not worth its time, for large problems and for small ones.
_GOOD, _CLOSED = 1e-3, 1e-9
# Pairs up to which prices from nil, or all of the relaxation's pairs, are the faster way.
_FEW_PAIRS, _MANY_PAIRS = 2_000, 20_000


class Options(NamedTuple):
    """How to solve, as `solve` is told; the deadline is on the clock of `time.perf_counter`."""

    rounding: str = "repair"
    seed: int = 0
    backend: str = "HIGHS"
    deadline: float = np.inf


class _Answer(NamedTuple):
    """What a solver says: an assignment, prices or a bound that prove it, what gave way."""

    assignment: BoolArray
    prices: FloatArray | None = None
    bound: float = np.inf
    relaxed: bool = False


def solve(
    problem: Problem,
    solver: str = "relaxation",
    rounding: str = "repair",
    seed: int = 0,
    backend: str = "HIGHS",
    time_limit: float = 0.0,
) -> Solution:
    """Solves an assignment problem.

    Args:
      problem: what to solve.
      solver: a name in `SOLVERS`. `relaxation` (CVXPY) takes every problem; `paths` (exact,
        NumPy) and `flow` (exact, OR-Tools) take equal weights; `dual` (JAX) takes any weights;
        `auto` chooses among them; the heuristics `greedy`, `random` and `round_robin` ignore the
        load bounds.
      rounding: how fractions are rounded. Both ways keep capacities exactly, and load bounds to
        within an expert's largest single weight. `shmoys_tardos` is worth at least the
        relaxation; `repair` (the default) gives up to 1 % of it to mend load bounds.
      seed: of ties and random choices.
      backend: which CVXPY solver the relaxation goes to: any that is installed, by CVXPY's name
        (`cvxpy.installed_solvers()`). An interior-point or first-order solver is as good as its
        tolerance, and the certificate says how good that was.
      time_limit: seconds after which a search for the optimum is given up; 0 for none. Rounding,
        local search, `dual` and the heuristics take a bounded number of steps, whatever the limit.

    Returns:
      The assignment with its certificate. Load bounds that cannot all hold give way, smallest
      weighted violation first, and the solution says which.

    Raises:
      InputError: unknown solver, rounding or backend, or one that does not take the problem.
      SolverError: the solver failed or the time was up. Never because of the bounds.
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
    answer = SOLVERS[solver](problem, Options(rounding, seed, backend, deadline))
    bound = _certify(problem, answer)
    seconds = time.perf_counter() - begin
    relaxed = answer.relaxed or has_impossible_bounds(problem)
    return make_solution(problem, answer.assignment, bound, seconds, relaxed=relaxed)


def require_solver(
    solver: str,
    *,
    weighted: bool = False,
    balance: bool = False,
    diversity: bool = False,
    sizes: bool = False,
    floors: bool = False,
) -> None:
    """Raises `InputError` for a solver that does not take problems with these terms.

    Args:
      solver: a name in `SOLVERS`.
      weighted: load weights differ from pair to pair.
      balance: there is a balance term.
      diversity: there is a diversity term.
      sizes: experts differ in size.
      floors: experts have a least number of holders.
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
    """Raises `InputError` for a name that is not known, with the nearest one that is."""
    names = sorted(known)
    if name in names:
        return
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(field, name, f"{hint}give one of {', '.join(names)}")


def _certify(problem: Problem, answer: _Answer) -> float:
    """The least bound that is proved; for bounds that gave way, as far as they gave way."""
    if answer.prices is None or problem.balance or problem.diversity:
        return answer.bound
    low, high = effective_bounds(problem)
    if answer.relaxed:
        load = expert_load(problem, answer.assignment)
        low, high = np.minimum(low, load), np.maximum(high, load)
        return price_bound(problem, answer.prices, low, high)
    return min(answer.bound, price_bound(problem, answer.prices, low, high))


def _relaxation(problem: Problem, options: Options, direct: bool = False) -> _Answer:
    plain = not (problem.balance or problem.diversity or problem.expert_size is not None)
    floors = bool(np.any(problem.holders_min)) and not problem.unit
    if plain and not floors and problem.fitness.size > _MANY_PAIRS:
        relaxed = solve_by_columns(
            problem, estimate_prices(problem), options.backend, options.deadline, direct
        )
    else:
        relaxed = solve_relaxation(problem, options.backend, options.deadline, direct)
    if problem.expert_size is not None:
        held = round_knapsack(problem, relaxed.x)
    else:
        held = round_shmoys_tardos(problem, relaxed.x)
    held = _polished(problem, held, relaxed.prices, relaxed.bound, options.rounding)
    return _Answer(held, relaxed.prices, relaxed.bound, relaxed.excess > 0)


def _paths(problem: Problem, options: Options) -> _Answer:
    unit, experts = problem.unit, problem.experts
    assert unit is not None
    low, high = effective_bounds(problem)
    low, high = (low / unit, high / unit) if unit else (np.zeros(experts), np.full(experts, 1e18))
    low = np.maximum(low, 0.0)
    target, curve = problem.load_target / (unit or 1.0), problem.balance * unit**2
    quantum = _quantum(problem, curve)
    # One unit of violation outweighs any path of swaps, each worth 2^32 quanta at the most.
    priority = np.asarray(problem.violation_weight / np.min(problem.violation_weight))
    weight = np.rint(np.minimum(priority, 1024.0) * 2**33 * (experts + 1))

    def marginal(y: FloatArray) -> FloatArray:
        outside = weight * ((y >= high).astype(float) - (y < low))
        return outside + np.rint(curve * (2 * (y - target) + 1) / quantum)

    few = problem.fitness.size <= _FEW_PAIRS or curve
    prices = np.zeros(experts) if few else estimate_prices(problem) * unit
    prices, fitness = np.rint(prices / quantum), np.rint(problem.fitness / quantum)
    load = take_top(fitness - prices, problem.capacity).sum(axis=0)
    if curve:
        start = np.clip(np.ceil(target - 0.5), low, high)
    else:
        start = np.where(prices > 0, high, np.where(prices < 0, low, np.clip(load, low, high)))
    found = augment(fitness, problem.capacity, marginal, prices, start, options.deadline)
    held = found.assignment
    count = held.sum(axis=0)
    relaxed = bool(((count < low) | (count > high)).any())
    if curve or not unit:
        # A quantum misjudges no pair by more than half of itself.
        bound = objective(problem, held) + quantum * float(problem.capacity.sum())
        return _Answer(held, bound=bound, relaxed=relaxed and bool(unit))
    # The prices prove the optimum; no trust in the search is needed.
    return _Answer(held, found.prices * quantum / unit, relaxed=relaxed)


def _quantum(problem: Problem, curve: float) -> float:
    """The grain of whole-number costs: sums of them are exact, so no path can go in circles."""
    span = float(np.ptp(problem.fitness)) if problem.fitness.size else 0.0
    most = float(np.max(np.abs(problem.fitness), initial=0.0))
    widest = span + 2 * curve * problem.clients
    return max(widest * 2.0**-32, most * 2.0**-45, 1e-290)


def _flow(problem: Problem, options: Options) -> _Answer:
    held, bound, relaxed = solve_flow(problem, options.deadline)
    return _Answer(held, bound=bound, relaxed=relaxed)


def _dual(problem: Problem, options: Options) -> _Answer:
    if problem.clients == 0 or problem.unit == 0:
        return _relaxation(problem, options)
    # JAX is loaded here alone: no other solver needs it.
    from flexmoe_jax.assignment.device import run_dual

    found = run_dual(problem)
    held = np.asarray(found.assignment)
    prices = np.asarray(found.prices.load, np.float64)
    mixed = bool(problem.diversity)
    bound = (
        float(found.bound) if mixed else price_bound(problem, prices, *effective_bounds(problem))
    )
    held = _polished(problem, held, prices, bound, options.rounding)
    broken = load_violation(problem, expert_load(problem, held)).any()
    # At equal weights the paths mend whatever can be mended.
    return _Answer(held, prices, bound, bool(broken and problem.unit is not None))


def _polished(
    problem: Problem, held: BoolArray, prices: FloatArray, bound: float, rounding: str
) -> BoolArray:
    """Local search where there is something to win: broken load bounds, or a gap."""
    value = objective(problem, held)
    broken = load_violation(problem, expert_load(problem, held)).any()
    good = _GOOD if problem.fitness.size > _MANY_PAIRS else _CLOSED
    if not broken and bound - value <= good * abs(bound):
        return held
    least = min(value, bound - _MENDING[rounding] * abs(bound)) if broken else value
    return polish(problem, held, prices, least)


def _auto(problem: Problem, options: Options) -> _Answer:
    if problem.expert_size is not None:
        return _relaxation(problem, options)
    if problem.unit is not None and not problem.diversity:
        return _paths(problem, options)
    floors = bool(np.any(problem.holders_min)) and not problem.unit
    if problem.diversity and not problem.balance and not floors and problem.fitness.size > 20_000:
        return _dual(problem, options)
    return _relaxation(problem, options, direct=True)


def _greedy(problem: Problem, options: Options) -> _Answer:
    keys = client_keys([options.seed], np.arange(problem.clients), problem.experts)
    return _unpriced(problem, take_best(problem.fitness, problem.capacity, keys))


def _random(problem: Problem, options: Options) -> _Answer:
    keys = client_keys([options.seed], np.arange(problem.clients), problem.experts)
    return _unpriced(problem, take_random(problem.capacity, keys))


def _round_robin(problem: Problem, options: Options) -> _Answer:
    clients = np.arange(problem.clients)
    return _unpriced(problem, take_in_turn(problem.capacity, clients, 0, problem.experts))


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


def _unpriced(problem: Problem, held: BoolArray) -> _Answer:
    """A heuristic's answer, bounded by what clients would take if loads did not matter."""
    free = float(np.sum(problem.fitness, where=take_top(problem.fitness, problem.capacity)))
    return _Answer(held, bound=free)
