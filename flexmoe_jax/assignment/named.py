"""Policies by name, with their options checked before any round.

Axis legend: `P` clients in this round's cohort, `E` experts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from flexmoe_jax.assignment.backends import require_backend
from flexmoe_jax.assignment.bounds import normalise_share
from flexmoe_jax.assignment.engine import ROUNDINGS, SOLVERS, require_name, require_solver
from flexmoe_jax.assignment.policies import POLICIES, Policy, Request
from flexmoe_jax.assignment.problem import FloatArray
from flexmoe_jax.assignment.solution import Solution
from flexmoe_jax.errors import InputError

# More than this overflows somewhere in sums over many clients.
_LARGEST = 1e100


@dataclass(frozen=True)
class NamedPolicy:
    """A policy by name, as `make_policy` makes it: what it is called with stays readable.

    Attributes:
      name: in `POLICIES`.
      options: what the policy takes beside the request.
    """

    name: str
    options: Mapping[str, Any]

    def __call__(self, request: Request) -> Solution:
        """Asks the policy, whatever the order of the cohort."""
        return _in_order(partial(POLICIES[self.name], **self.options), request)

    def settled(self) -> NamedPolicy:
        """The same for clients that join beside others, and are to use what they get.

        Without noise on the fitness, which is there so that holders change, and without a least
        number of holders, which the others are.
        """
        unsettling = {"exploration", "holders_min"} & self.options.keys()
        options = {**self.options, **dict.fromkeys(unsettling, 0)}
        return replace(self, options=MappingProxyType(options))


def make_policy(
    name: str,
    *,
    slack: float = 0.1,
    solver: str = "auto",
    rounding: str = "repair",
    backend: str = "HIGHS",
    weighted: bool = False,
    share: FloatArray | None = None,
    holders_min: int = 0,
    balance: float = 0.0,
    diversity: float = 0.0,
    movement: float = 0.0,
    exploration: float = 0.0,
    exploration_rounds: int = 0,
    time_limit: float = 60.0,
) -> NamedPolicy:
    """Makes the policy of that name.

    Args:
      name: a name in `POLICIES`.
      slack: δ, by how much of its share an expert's load may miss its target (`flex`).
      solver: a name in `SOLVERS` (`flex`).
      rounding: a name in `ROUNDINGS` (`flex`).
      backend: the CVXPY solver that relaxations go to, by CVXPY's name (`flex`).
      weighted: whether load weights will differ from pair to pair, so that a solver that takes
        equal ones alone is refused at once (`flex`).
      share: [E] part of the load meant for each expert (`flex`); default: the same for all.
        Whoever keeps the deficits must reckon with it, too.
      holders_min: least number of clients that hold each expert (`flex`).
      balance: worth of one squared unit of load off target (`flex`).
      diversity: worth of one unit by which an expert's holders deviate, in sum, from the cohort's
        mean descriptor (`flex`); needs the request's descriptor.
      movement: price, in fitness, of sending an expert to a client that does not have it (`flex`).
      exploration: width of the uniform noise, drawn anew every round, that is added to the fitness
        (`flex`): holders change even where the fitness does not, so every expert meets the data of
        many clients.
      exploration_rounds: in which that width falls to 0 along a line, so that experts then stay
        where they fit (`flex`); 0 for never.
      time_limit: seconds that a round's search for the optimum may take; 0 for no limit (`flex`).
        Where it is exceeded, or the solver fails, experts are dealt out evenly for that round, and
        the solution's status is `fallback: REASON`.

    Raises:
      InputError: an unknown policy, solver, rounding or backend, or a number out of range.
    """
    require_name("assignment.policy", name, POLICIES)
    require_name("assignment.solver", solver, SOLVERS)
    require_name("assignment.rounding", rounding, ROUNDINGS)
    require_backend(backend)
    numbers = {
        "slack": slack,
        "holders_min": holders_min,
        "balance": balance,
        "diversity": diversity,
        "movement": movement,
        "exploration": exploration,
        "exploration_rounds": exploration_rounds,
        "time_limit": time_limit,
    }
    for field, number in numbers.items():
        if not 0 <= number <= _LARGEST:
            raise InputError(f"assignment.{field}", number, f"give a number from 0 to {_LARGEST:g}")
    if share is not None:
        normalise_share(share, np.size(share))
    if name != "flex":
        return NamedPolicy(name, MappingProxyType({}))
    require_solver(
        solver,
        weighted=weighted,
        balance=balance > 0,
        diversity=diversity > 0,
        floors=holders_min > 0,
    )
    options = {"solver": solver, "rounding": rounding, "backend": backend, "share": share}
    policy = NamedPolicy(name, MappingProxyType(options | numbers))
    if backend != "HIGHS":
        _require_use(policy, weighted)
    return policy


def _require_use(policy: NamedPolicy, weighted: bool) -> None:
    """Raises `InputError` for a backend that cannot solve a small problem of the policy's kind.

    What its name does not tell shows now and not in the first round: whether it takes quadratic
    prices, say, or has a licence.
    """
    request = Request(
        fitness=np.eye(3, 2),
        capacity=np.ones(3, np.int64),
        clients=np.arange(3),
        round=0,
        seed=0,
        load_weight=np.array([1.0, 2.0, 3.0]) if weighted else 1.0,
        descriptor=np.eye(3),
    )
    options = {**policy.options, "share": None, "time_limit": 0.0}
    status = NamedPolicy(policy.name, options)(request).status
    if status.startswith("fallback"):
        reason = status.removeprefix("fallback: ")
        remedy = f"it does not solve 3 clients' problem: {reason}; use HIGHS"
        raise InputError("assignment.backend", options["backend"], remedy)


def _in_order(policy: Policy, request: Request) -> Solution:
    """Runs a policy on the cohort sorted by client id, and puts its answer back in order."""
    begin = time.perf_counter()
    order = np.argsort(request.clients, kind="stable")
    weight = np.asarray(request.load_weight)
    tables: dict[str, Any] = {
        name: None if table is None else np.asarray(table)[order]
        for name in ("usage", "held_rounds", "descriptor", "held")
        for table in [getattr(request, name)]
    }
    found = policy(
        replace(
            request,
            fitness=np.asarray(request.fitness, np.float64)[order],
            capacity=np.asarray(request.capacity)[order],
            clients=np.asarray(request.clients)[order],
            load_weight=weight[order] if weight.ndim else float(weight),
            **tables,
        )
    )
    assignment = np.empty_like(found.assignment)
    assignment[order] = found.assignment
    return replace(found, assignment=assignment, seconds=time.perf_counter() - begin)
