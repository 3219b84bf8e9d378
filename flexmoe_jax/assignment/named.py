"""Policies by name, with options that are checked before the first round.

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
from flexmoe_jax.assignment.policies import PLAIN, POLICIES, Policy, Request
from flexmoe_jax.assignment.problem import FloatArray
from flexmoe_jax.assignment.solution import Solution
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.assignment import AssignmentOptions

# Options that the records share with policies, and that policies do not use.
_OF_OTHERS = {"layers", "load", "deficit_decay"}


@dataclass(frozen=True)
class NamedPolicy:
    """A policy that `make_policy` creates; its name and options can be inspected.

    Attributes:
      name: a name in `POLICIES`.
      options: keyword arguments of the policy besides the request.
    """

    name: str
    options: Mapping[str, Any]

    def __call__(self, request: Request) -> Solution:
        """Runs the policy; the answer does not depend on the order of the cohort."""
        return _in_order(partial(POLICIES[self.name], **self.options), request)


def make_policy(
    name: str, *, weighted: bool = False, share: FloatArray | None = None, **given: Any
) -> NamedPolicy:
    """Creates the policy of that name.

    Args:
      name: a name in `POLICIES`.
      weighted: whether load weights will differ from pair to pair. If so, a solver that supports
        only equal weights is rejected immediately (`flex`).
      share: [E] part of the load that each expert should get (`flex`); default: the same for all.
        The code that updates the deficits must use the same shares.
      **given: options of `flex` by name, as `AssignmentOptions` and docs/options.md explain them:
        `slack`, `solver`, `time_limit` and so on. The defaults are theirs, but `exploration` is 0.
        If a search takes longer than `time_limit`, or the solver fails, experts are dealt out
        evenly for that round, and the solution's status is `fallback: REASON`.

    Raises:
      InputError: an unknown policy, solver, rounding or backend, or a number out of range.
      TypeError: an option that does not exist.
    """
    require_name("assignment.policy", name, POLICIES)
    if wrong := _OF_OTHERS & set(given):
        raise TypeError(f"make_policy: {', '.join(sorted(wrong))} belong to the federation")
    options = replace(PLAIN, **given)
    require_name("assignment.solver", options.solver, SOLVERS)
    require_name("assignment.rounding", options.rounding, ROUNDINGS)
    require_backend(options.backend)
    if share is not None:
        normalise_share(share, np.size(share))
    if name != "flex":
        return NamedPolicy(name, MappingProxyType({}))
    require_solver(
        options.solver,
        weighted=weighted,
        balance=options.balance > 0,
        diversity=options.diversity > 0,
        floors=options.holders_min > 0,
    )
    policy = NamedPolicy(name, MappingProxyType({"options": options, "share": share}))
    if options.backend != "HIGHS":
        _require_use(policy, options, weighted)
    return policy


def _require_use(policy: NamedPolicy, options: AssignmentOptions, weighted: bool) -> None:
    """Raises `InputError` if a backend cannot solve a small problem of the policy's kind.

    This finds errors that the backend's name does not show before the first round: for example, it
    does not support quadratic terms, or it has no licence.
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
    patient = {"options": replace(options, time_limit=0.0)}
    status = NamedPolicy(policy.name, patient)(request).status
    if status.startswith("fallback"):
        reason = status.removeprefix("fallback: ")
        remedy = f"it does not solve 3 clients' problem: {reason}; use HIGHS"
        raise InputError("assignment.backend", options.backend, remedy)


def _in_order(policy: Policy, request: Request) -> Solution:
    """Runs a policy on the cohort sorted by client id, and restores the order in its answer."""
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
