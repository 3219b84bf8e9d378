"""The relaxation as CVXPY programs, cached in canonical form and solved again with new numbers.

A caller has exclusive use of a program: it takes the program out of the cache and puts it back
after the solve. So threads, and signal handlers that solve, never overwrite each other's numbers,
and a program whose solve was interrupted is not used again.

Axis legend: `C` clients, `E` experts, `F` features in a client's descriptor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from flexmoe_jax.assignment.backends import cvxpy, modelling, run
from flexmoe_jax.assignment.certificate import Prices
from flexmoe_jax.assignment.problem import FloatArray, IntArray, Problem, SolverError

# Margin for the solver's rounding error when the violation is limited to the smallest possible.
_EXCESS_ROOM = 1e-7
# Cache of programs that are not in use, with their keys; the oldest is dropped first.
_SHELF: deque[tuple[Hashable, Program]] = deque(maxlen=16)


class Found(NamedTuple):
    """Optimum of a program: flat `x`, its value, prices, and prices that prove a contradiction."""

    x: FloatArray
    value: float
    prices: Prices
    witness: Prices | None = None


class Numbers(NamedTuple):
    """The parameter values of a program.

    Attributes:
      fitness: fitness of each pair.
      capacity: capacity of each client.
      low: minimum load of each expert.
      high: maximum load of each expert.
      holders: minimum number of holders of each expert; for programs with floors.
      violation_weight: violation weight of each expert.
      weight: load of each pair; for programs that were created without weights.
    """

    fitness: FloatArray
    capacity: FloatArray | IntArray
    low: FloatArray
    high: FloatArray
    holders: FloatArray
    violation_weight: FloatArray
    weight: FloatArray | None = None


class _Bounds(NamedTuple):
    """Constraints whose dual values are prices."""

    high: Any
    low: Any
    holders: Any

    def prices(self, mix: list[Any]) -> Prices:
        """Returns the prices per unit of load, of mix and of holders."""
        load = _dual(self.high) - _dual(self.low)
        return Prices(
            load,
            np.stack([_dual(part) for part in mix], axis=1) if mix else None,
            None if self.holders is None else _dual(self.holders),
        )


class Program:
    """A CVXPY problem over given pairs.

    Args:
      client: client of each pair, in 0 .. clients - 1.
      expert: expert of each pair.
      clients: number of clients.
      experts: number of experts.
      weight: load of each pair, or None to pass it with every solve. None is for small problems:
        as a parameter, the weight takes memory quadratic in the number of pairs.
      floors: whether experts need a minimum number of holders.
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
        """Builds the problems with strict bounds and with elastic bounds."""
        with modelling():
            cp = cvxpy()
            pairs = client.size
            self._x = cp.Variable(pairs, bounds=[0, 1])
            self._fitness = cp.Parameter(pairs)
            self._weight = cp.Parameter(pairs) if weight is None else None
            self._capacity = cp.Parameter(clients)
            self._low, self._high = cp.Parameter(experts), cp.Parameter(experts)
            self._holders = cp.Parameter(experts) if floors else None
            self._violation_weight = cp.Parameter(experts, nonneg=True)
            self._allowed = cp.Parameter(nonneg=True)
            rows, columns = _sums(client, clients), _sums(expert, experts)
            if weight is None:
                load = columns @ cp.multiply(self._weight, self._x)
            else:
                load = columns @ _diagonal(weight) @ self._x
            self._build(rows, columns, load, client, expert, extras)

    def _build(
        self,
        rows: Any,
        columns: Any,
        load: Any,
        client: IntArray,
        expert: IntArray,
        extras: Problem | None,
    ) -> None:
        cp, experts = cvxpy(), columns.shape[0]
        worth: Any = self._fitness @ self._x
        choice = rows @ self._x == self._capacity
        if extras is not None and extras.expert_size is not None:
            choice = rows @ cp.multiply(extras.expert_size[expert], self._x) <= self._capacity
        self._mix: list[Any] = []
        if extras is not None and extras.diversity:
            # The mix is a separate variable, so that it has a price.
            mix = cp.Variable((experts, extras.deviation.shape[1]))
            self._mix = [
                columns @ cp.multiply(feature[client], self._x) == mix[:, f]
                for f, feature in enumerate(extras.deviation.T)
            ]
            worth = worth - extras.diversity * cp.sum(cp.abs(mix))
        if extras is not None and extras.balance:
            worth = worth - extras.balance * cp.sum_squares(load - extras.load_target)
        slack = cp.Variable(experts, nonneg=True)
        lack = cp.Variable(experts, nonneg=True)
        # Violations in units of load and in holders have the same weight.
        weighted = self._violation_weight @ (slack + lack)
        held, least = columns @ self._x, self._holders
        self._bounds = _Bounds(
            load <= self._high, load >= self._low, None if least is None else held >= least
        )
        self._elastic_bounds = _Bounds(
            load <= self._high + slack,
            load >= self._low - slack,
            None if least is None else held >= least - lack,
        )
        firm = [of for of in self._bounds if of is not None]
        elastic = [lack == 0 if of is None else of for of in self._elastic_bounds]
        self._firm = cp.Problem(cp.Maximize(worth), [choice, *self._mix, *firm])
        self._least = cp.Problem(cp.Minimize(weighted), [choice, *elastic])
        self._elastic = cp.Problem(
            cp.Maximize(worth), [choice, *self._mix, *elastic, weighted <= self._allowed]
        )

    def solve(
        self, backend: str, numbers: Numbers, deadline: float, give_way: bool = True
    ) -> Found | None:
        """Solves with these numbers; None if bounds cannot be met and `give_way` is False.

        Raises:
          InputError: the backend does not support such programs.
          SolverError: the backend failed, or the deadline passed.
        """
        self._fitness.value = numbers.fitness
        if self._weight is not None:
            self._weight.value = numbers.weight
        self._capacity.value = np.asarray(numbers.capacity, np.float64)
        self._low.value, self._high.value = numbers.low, numbers.high
        self._violation_weight.value = numbers.violation_weight
        if self._holders is not None:
            self._holders.value = numbers.holders
        if run(self._firm, backend, deadline):
            return self._found(self._firm, self._bounds.prices(self._mix), None)
        if not give_way:
            return None
        if not run(self._least, backend, deadline):
            raise SolverError(f"{backend} took a problem that has solutions for one that has none")
        witness = self._elastic_bounds.prices([])
        excess = max(float(self._least.value), 0.0)
        self._allowed.value = excess + _EXCESS_ROOM * max(1.0, excess)
        if not run(self._elastic, backend, deadline):
            raise SolverError(f"{backend} cannot keep to the least violation that it found")
        return self._found(self._elastic, self._elastic_bounds.prices(self._mix), witness)

    def _found(self, solved: Any, prices: Prices, witness: Prices | None) -> Found:
        return Found(np.asarray(self._x.value), float(solved.value), prices, witness)


def solve_kept(
    clients: int,
    experts: int,
    floors: bool,
    backend: str,
    numbers: Numbers,
    deadline: float,
) -> Found:
    """Solves a program over all pairs; reuses a cached program if there is one.

    If `numbers` contains no weights, all pairs weigh 1.
    """
    key = (clients, experts, floors, numbers.weight is None)
    program = _take(key)
    if program is None:
        weight = np.ones(clients * experts) if numbers.weight is None else None
        program = Program(
            *all_pairs(clients, experts), clients, experts, weight=weight, floors=floors
        )
    found = program.solve(backend, numbers, deadline)
    assert found is not None
    # After an exception the program is not cached, because its state is then unknown.
    _SHELF.append((key, program))
    return found


def _take(key: Hashable) -> Program | None:
    for item in tuple(_SHELF):
        if item[0] == key:
            try:
                _SHELF.remove(item)
            except ValueError:  # Another thread was faster.
                continue
            return item[1]
    return None


def all_pairs(clients: int, experts: int) -> tuple[IntArray, IntArray]:
    """Returns the client and the expert of every pair, client by client."""
    return np.repeat(np.arange(clients), experts), np.tile(np.arange(experts), clients)


def _sums(group: IntArray, groups: int) -> Any:
    """Builds a sparse matrix of ones, (groups, pairs), that sums the pairs of each group."""
    import scipy.sparse

    places = (group, np.arange(group.size))
    return scipy.sparse.csr_array((np.ones(group.size), places), shape=(groups, group.size))


def _diagonal(values: FloatArray) -> Any:
    import scipy.sparse

    return scipy.sparse.diags_array(np.asarray(values))


def _dual(constraint: Any) -> FloatArray:
    """Returns the dual values, or zeros (a weaker bound) if the backend provides none."""
    value = constraint.dual_value
    return np.zeros(constraint.shape) if value is None else np.asarray(value, np.float64)
