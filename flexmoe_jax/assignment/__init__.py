"""Expert assignment: problems, solvers with certificates, and policies for federated rounds.

It imports neither Flax nor its sibling packages, except `options`, and JAX only for `dual_assign`.

Axis legend: `C` clients, `P` clients in this round's cohort, `E` experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexmoe_jax.assignment.bounds import load_bounds, update_deficit, window_deficit
from flexmoe_jax.assignment.engine import ROUNDINGS, SOLVERS, solve
from flexmoe_jax.assignment.layers import solve_layers
from flexmoe_jax.assignment.named import NamedPolicy, make_policy
from flexmoe_jax.assignment.policies import POLICIES, Policy, Request, as_solution
from flexmoe_jax.assignment.problem import Problem, SolverError
from flexmoe_jax.assignment.solution import Solution
from flexmoe_jax.assignment.use import split_use

if TYPE_CHECKING:
    from flexmoe_jax.assignment.dual import DualSolution, dual_assign

__all__ = [
    "POLICIES",
    "ROUNDINGS",
    "SOLVERS",
    "DualSolution",
    "NamedPolicy",
    "Policy",
    "Problem",
    "Request",
    "Solution",
    "SolverError",
    "as_solution",
    "dual_assign",
    "load_bounds",
    "make_policy",
    "solve",
    "solve_layers",
    "split_use",
    "update_deficit",
    "window_deficit",
]


def __getattr__(name: str) -> Any:
    """Imports the names that need JAX on first access."""
    if name not in ("DualSolution", "dual_assign"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flexmoe_jax.assignment import dual

    return getattr(dual, name)
