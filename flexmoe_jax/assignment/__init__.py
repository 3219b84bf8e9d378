"""Who holds which expert: problems, solvers with certificates, and policies for federated rounds.

Imports neither Flax nor the other rooms of the package. Axis legend: `C` clients, `P` clients in
this round's cohort, `E` experts.
"""

from flexmoe_jax.assignment.bounds import load_bounds, update_deficit, window_deficit
from flexmoe_jax.assignment.dual import DualSolution, dual_assign
from flexmoe_jax.assignment.engine import ROUNDINGS, SOLVERS, solve
from flexmoe_jax.assignment.layers import solve_layers
from flexmoe_jax.assignment.policies import POLICIES, Policy, Request, make_policy
from flexmoe_jax.assignment.problem import Problem, Solution

__all__ = [
    "POLICIES",
    "ROUNDINGS",
    "SOLVERS",
    "DualSolution",
    "Policy",
    "Problem",
    "Request",
    "Solution",
    "dual_assign",
    "load_bounds",
    "make_policy",
    "solve",
    "solve_layers",
    "update_deficit",
    "window_deficit",
]
