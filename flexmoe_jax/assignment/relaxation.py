"""The convex relaxation of the assignment, solved through CVXPY.

    maximise Σ q_i x_i   over 0 ≤ x ≤ 1,   R x = k,   L_min ≤ W (w ∘ x) ≤ L_max

with one flat variable `x`, an entry a pair, and two sparse matrices of ones: `R` sums a client's
pairs, `W` an expert's. Memory is linear in C·E. Numbers are CVXPY parameters, so a problem of the
same shape is solved again without being canonicalised again. Where the load bounds cannot hold, a
first problem finds the smallest weighted violation, and the second keeps to it. `solve_directly` is
the same program where it is a linear one and the bounds hold, without CVXPY.

Axis legend: `C` clients, `E` experts, `F` numbers that describe a client.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from flexmoe_jax.assignment.certificate import effective_bounds, price_bound
from flexmoe_jax.assignment.linear import FEW_VARIABLES, HIGHS_OPTIONS, Rows, maximise
from flexmoe_jax.assignment.problem import FloatArray, IntArray, Problem, SolverError, seconds_left
from flexmoe_jax.errors import InputError

# Solvers that stop near the optimum: prices prove a bound even so, their optimum does not.
_FIRST_ORDER = ("CUOPT", "OSQP", "PDLP", "SCS")
# What the backends call their time limit in seconds; others run without one.
_TIME_LIMIT = MappingProxyType(
    {
        "CLARABEL": "time_limit",
        "GLOP": "time_limit_sec",
        "GUROBI": "TimeLimit",
        "HIGHS": "time_limit",
        "OSQP": "time_limit",
        "PDLP": "time_limit_sec",
        "SCS": "time_limit_secs",
    }
)
# Pairs up to which weights may be parameters: canonical form then is 4096² numbers at most.
_FEW_PAIRS = 4096
# Room that a solver's rounding error needs when it must keep to the least violation.
_EXCESS_ROOM = 1e-7


class Relaxed(NamedTuple):
    """Optimum of the relaxation.

    Attributes:
      x: [C, E] fractions in [0, 1].
      prices: [E] optimal prices λ on load.
      bound: an upper bound for assignments within the bounds; where the bounds gave way, the
        optimum of the elastic problem.
      excess: the smallest weighted violation of the load bounds; 0 where they can hold.
    """

    x: FloatArray
    prices: FloatArray
    bound: float
    excess: float


def solve_relaxation(
    problem: Problem, backend: str = "HIGHS", deadline: float = np.inf, direct: bool = False
) -> Relaxed:
    """Solves the relaxation; load bounds that contradict each other or the capacities give way.

    Args:
      problem: what to solve.
      backend: any CVXPY solver that is installed; HiGHS leaves quadratic terms to Clarabel.
      deadline: on the clock of `time.perf_counter`.
      direct: whether HiGHS may be given the program without CVXPY, where it is linear.

    Raises:
      InputError: the CVXPY solver is not installed or does not take such problems; or it is a
        first-order one, and the problem has terms for which only its optimum proves a bound.
      SolverError: the CVXPY solver failed, or the deadline passed.
    """
    require_backend(backend)
    clients, experts = problem.fitness.shape
    if clients == 0:
        return Relaxed(np.zeros((0, experts)), np.zeros(experts), 0.0, 0.0)
    low, high = effective_bounds(problem)
    # With one weight for all pairs the load bounds contain the floors already.
    floors = bool(np.any(problem.holders_min)) and not problem.unit
    extended = bool(problem.diversity or problem.balance) or problem.expert_size is not None
    unit = 1.0 if extended or not problem.unit else problem.unit
    if (extended or floors) and backend in _FIRST_ORDER:
        terms = "balance, diversity, sizes or weighted floors"
        raise InputError("assignment.backend", backend, f"too inexact for {terms}; use HIGHS")
    # Solvers take numbers near 0 for 0: fitness goes in with 1 for its largest.
    scale = 1.0 if extended else float(np.abs(problem.fitness).max()) or 1.0
    fitness, sides = problem.fitness.ravel() / scale, (low / unit, high / unit)
    found = None
    if direct and backend == "HIGHS" and not (extended or floors):
        pairs, weights = _all_pairs(clients, experts), problem.weights.ravel() / unit
        found = solve_directly(*pairs, weights, fitness, problem.capacity, *sides, deadline)
    if found is None:
        weight = None
        if extended:
            program = _program(problem, floors, problem.weights.ravel(), problem)
        elif problem.unit:
            program = _unit_program(clients, experts, floors)
        elif clients * experts <= _FEW_PAIRS:
            program, weight = _weighted_program(clients, experts, floors), problem.weights.ravel()
        else:
            program = _program(problem, floors, problem.weights.ravel(), None)
        found = program.solve(
            backend,
            fitness=fitness,
            weight=weight,
            capacity=problem.capacity,
            low=sides[0],
            high=sides[1],
            holders=np.asarray(problem.holders_min),
            violation_weight=np.asarray(problem.violation_weight),
            deadline=deadline,
        )
    x = np.clip(found.x, 0.0, 1.0).reshape(clients, experts)
    prices = found.prices * scale / unit
    if extended or floors or found.excess > 0:
        value = found.value * scale
        bound = value + _EXCESS_ROOM * max(1.0, abs(value))
    else:
        bound = price_bound(problem, prices, low, high)
    return Relaxed(x, prices, bound, found.excess * unit)


def require_backend(backend: str) -> None:
    """Raises `InputError` for a CVXPY solver that is not installed."""
    # HiGHS always is, and CVXPY takes a while to load.
    if backend != "HIGHS" and backend not in _installed():
        raise InputError("assignment.backend", backend, f"give one of {', '.join(_installed())}")


class Found(NamedTuple):
    """Optimum of a program: flat `x`, prices [E] on load, value, and least violation."""

    x: FloatArray
    prices: FloatArray
    value: float
    excess: float


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
    """The relaxation over given pairs, without CVXPY; None where the load bounds cannot hold.

    Args:
      client: client of each pair.
      expert: expert of each pair.
      weight: load of each pair.
      fitness: of each pair.
      capacity: of each client.
      low: least load of each expert.
      high: greatest load of each expert.
      deadline: on the clock of `time.perf_counter`.
    """
    full, balanced = Rows(client, 1.0, capacity, capacity), Rows(expert, weight, low, high)
    optimum = maximise(fitness, full, balanced, deadline=deadline)
    if optimum is None:
        return None
    return Found(optimum.x, optimum.prices[1], optimum.value, 0.0)


class Program:
    """A CVXPY problem over given pairs, kept in canonical form and solved anew with new numbers.

    Args:
      client: client of each pair, in 0 .. clients - 1.
      expert: expert of each pair.
      clients: number of clients.
      experts: number of experts.
      weight: load of each pair, or None to give it anew with every solve (for small problems:
        as a parameter it takes memory quadratic in the number of pairs).
      floors: whether experts have a least number of holders.
      extras: a problem whose balance, diversity and expert sizes enter as constants, or None.
    """

    def __init__(
        self,
        client: IntArray,
        expert: IntArray,
        clients: int,
        experts: int,
        *,
        weight: FloatArray | None,
        floors: bool = False,
        extras: Problem | None = None,
    ) -> None:
        """Builds the firm and the elastic problems."""
        import scipy.sparse

        cp = _cvxpy()
        pairs = client.size
        self._x = cp.Variable(pairs, bounds=[0, 1])
        self._fitness = cp.Parameter(pairs)
        self._weight = cp.Parameter(pairs) if weight is None else None
        self._capacity = cp.Parameter(clients)
        self._low, self._high = cp.Parameter(experts), cp.Parameter(experts)
        self._holders = cp.Parameter(experts) if floors else None
        self._violation_weight = cp.Parameter(experts, nonneg=True)
        self._allowed = cp.Parameter(nonneg=True)
        one, column = np.ones(pairs), np.arange(pairs)
        rows = scipy.sparse.csr_array((one, (client, column)), shape=(clients, pairs))
        columns = scipy.sparse.csr_array((one, (expert, column)), shape=(experts, pairs))
        if self._weight is None:
            load = columns @ scipy.sparse.diags_array(np.asarray(weight)) @ self._x
        else:
            load = columns @ cp.multiply(self._weight, self._x)
        worth: Any = self._fitness @ self._x
        firm: list[Any] = []
        if extras is not None and extras.expert_size is not None:
            firm.append(rows @ cp.multiply(extras.expert_size[expert], self._x) <= self._capacity)
        else:
            firm.append(rows @ self._x == self._capacity)
        if extras is not None and extras.diversity:
            mix = [
                columns @ cp.multiply(feature[client], self._x) for feature in extras.deviation.T
            ]
            worth = worth - extras.diversity * sum(cp.norm1(part) for part in mix)
        if extras is not None and extras.balance:
            worth = worth - extras.balance * cp.sum_squares(load - extras.load_target)
        slack = cp.Variable(experts, nonneg=True)
        lack = cp.Variable(experts, nonneg=True)
        # Violations are counted in units of load and of holders alike.
        weighted = self._violation_weight @ (slack + lack)
        elastic = [*firm, load <= self._high + slack, load >= self._low - slack]
        self._bounds = [load <= self._high, load >= self._low]
        firm += self._bounds
        if self._holders is None:
            elastic.append(lack == 0)
        else:
            firm.append(columns @ self._x >= self._holders)
            elastic.append(columns @ self._x >= self._holders - lack)
        self._elastic_bounds = elastic[-3:-1]
        self._firm = cp.Problem(cp.Maximize(worth), firm)
        self._least = cp.Problem(cp.Minimize(weighted), elastic)
        self._elastic = cp.Problem(cp.Maximize(worth), [*elastic, weighted <= self._allowed])

    def solve(
        self,
        backend: str,
        *,
        fitness: FloatArray,
        capacity: FloatArray | IntArray,
        low: FloatArray,
        high: FloatArray,
        holders: FloatArray,
        violation_weight: FloatArray,
        weight: FloatArray | None = None,
        give_way: bool = True,
        deadline: float = np.inf,
    ) -> Found:
        """Solves with these numbers: fitness of pairs, capacity of clients, load bounds, and so on.

        Without `give_way` bounds that cannot hold are left at that: `excess` is then infinite.
        """
        self._fitness.value = fitness
        if self._weight is not None:
            self._weight.value = weight
        self._capacity.value = np.asarray(capacity, np.float64)
        self._low.value, self._high.value = low, high
        self._violation_weight.value = violation_weight
        if self._holders is not None:
            self._holders.value = holders
        if _run(self._firm, backend, deadline):
            return self._found(self._firm, self._bounds, 0.0)
        if not give_way:
            return Found(np.zeros(fitness.size), np.zeros(low.size), 0.0, np.inf)
        if not _run(self._least, backend, deadline):
            raise SolverError(f"{backend} took a problem that has solutions for one that has none")
        excess = max(float(self._least.value), 0.0)
        self._allowed.value = excess + _EXCESS_ROOM * max(1.0, excess)
        if not _run(self._elastic, backend, deadline):
            raise SolverError(f"{backend} cannot keep to the least violation that it found")
        return self._found(self._elastic, self._elastic_bounds, excess)

    def _found(self, solved: Any, bounds: list[Any], excess: float) -> Found:
        prices = np.asarray(bounds[0].dual_value) - np.asarray(bounds[1].dual_value)
        return Found(np.asarray(self._x.value), prices, float(solved.value), excess)


@lru_cache(maxsize=8)
def _unit_program(clients: int, experts: int, floors: bool) -> Program:
    one = np.ones(clients * experts)
    return Program(*_all_pairs(clients, experts), clients, experts, weight=one, floors=floors)


@lru_cache(maxsize=8)
def _weighted_program(clients: int, experts: int, floors: bool) -> Program:
    return Program(*_all_pairs(clients, experts), clients, experts, weight=None, floors=floors)


def _program(problem: Problem, floors: bool, weight: FloatArray, extras: Problem | None) -> Program:
    clients, experts = problem.fitness.shape
    pairs = _all_pairs(clients, experts)
    return Program(*pairs, clients, experts, weight=weight, floors=floors, extras=extras)


def _all_pairs(clients: int, experts: int) -> tuple[IntArray, IntArray]:
    return np.repeat(np.arange(clients), experts), np.tile(np.arange(experts), clients)


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    return tuple(_cvxpy().installed_solvers())


def _cvxpy() -> Any:
    """CVXPY, loaded when it is first needed."""
    import cvxpy

    return cvxpy


def _run(program: Any, backend: str, deadline: float) -> bool:
    """Solves; says whether it was feasible."""
    cp = _cvxpy()
    options: dict[str, Any] = dict(HIGHS_OPTIONS) if backend == "HIGHS" else {}
    if backend == "HIGHS" and program.size_metrics.num_scalar_variables <= FEW_VARIABLES:
        options["presolve"] = "off"
    if backend == "HIGHS" and not program.objective.expr.is_pwl():
        # HiGHS' active-set method for quadratics can cycle for ever on degenerate problems.
        backend, options = "CLARABEL", {}
    left = seconds_left(deadline)
    if left < np.inf and backend in _TIME_LIMIT:
        options[_TIME_LIMIT[backend]] = left
    try:
        data, chain, inverse = program.get_problem_data(backend, solver_opts=options)
    except (cp.SolverError, ImportError) as error:
        raise _refused(backend, error) from error
    try:
        # From scratch: of several optima a warm start finds another one after every past, and a run
        # that goes on from a checkpoint has another past.
        raw = chain.solve_via_data(program, data, warm_start=False, solver_opts=options)
        with warnings.catch_warnings():
            # Inexact answers: the certificate says how good they are, and limits are errors here.
            warnings.simplefilter("ignore")
            program.unpack_results(raw, chain, inverse)
    except ImportError as error:
        raise _refused(backend, error) from error
    # CVXPY answers a status that it does not know with a ValueError.
    except (cp.SolverError, ValueError) as error:
        raise SolverError(f"{backend} failed") from error
    # `infeasible_inaccurate` and `infeasible_or_unbounded` too: nothing here is unbounded.
    if program.status.startswith(cp.INFEASIBLE):
        return False
    if program.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        seconds_left(deadline)
        raise SolverError(f"{backend} ended with status {program.status}")
    return True


def _refused(backend: str, error: Exception) -> InputError:
    reason = str(error).splitlines()[0]
    others = ", ".join(name for name in _installed() if name != backend)
    return InputError("assignment.backend", backend, f"{reason} Try {others}")
