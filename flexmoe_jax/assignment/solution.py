"""Solutions: an assignment together with its value, bound, loads and status.

Axis legend: `C` clients, `E` experts, `G` layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexmoe_jax.assignment.problem import (
    TINY,
    BoolArray,
    FloatArray,
    Problem,
    expert_load,
    load_violation,
    missing_holders,
    objective,
)

# A relative gap below this is rounding error of the solvers, so the solution counts as optimal.
GAP_TOLERANCE = 1e-6
# Largest error of summing the value's terms, relative to the sum of their absolute values.
_ROUNDING = 8 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Solution:
    """An assignment with its certificate.

    Attributes:
      assignment: [C, E] bool, whether client c holds expert e.
      value: `Σ Q_ce x_ce` of the assignment, minus the balance and diversity terms if they are on.
      bound: upper bound on the value of any assignment within the load bounds. If `status` is
        `relaxed`, it holds for the relaxed bounds.
      gap: `(bound - value) / |bound|`, at least 0 and independent of the unit of fitness. If the
        summed terms nearly cancel, 1e-12 of the sum of their absolute values replaces |bound|.
      load: [E] load of each expert.
      violation: [E] how far each load is outside its bounds, ≥ 0, in units of load; holders that
        are missing (`holders_min`) are not in it.
      status: `optimal` (within the bounds, no gap), `feasible` (within the bounds), `relaxed`
        (not all bounds can be met, so some were relaxed) or `violated` (bounds that can be met
        are not: because of rounding, within its guarantee, or because the solver ignores them).
        Policies add `fallback: REASON` if the solver failed and experts were dealt out evenly.
      seconds: wall time that the solver took.
      use: [C, E] part of its work that each client should give to each expert (see `split_use`),
        which the server adds to a policy's answer; None for even parts.
      alike: whether the server took into account which clients are alike (see `server.affinity`).
    """

    assignment: BoolArray
    value: float
    bound: float
    gap: float
    load: FloatArray
    violation: FloatArray
    status: str
    seconds: float
    use: FloatArray | None = None
    alike: bool = False

    def __str__(self) -> str:
        """Returns a one-line summary."""
        *layers, clients, experts = self.assignment.shape
        size = f"{layers[0]} layers x " if layers else ""
        text = (
            f"{self.status}: {size}{clients} clients x {experts} experts, value {self.value:.6g}, "
            f"bound {self.bound:.6g}, gap {self.gap:.2%}, "
            f"load {self.load.min():.6g} to {self.load.max():.6g}, {self.seconds:.3f} s"
        )
        broken = np.argwhere(self.violation).tolist()
        if broken:
            text += "; out of bounds: " + ", ".join(
                "".join(f"layer {g} " for g in layer)
                + f"expert {e} by {self.violation[(*layer, e)]:.6g}"
                for *layer, e in broken[:8]
            )
            text += f" and {len(broken) - 8} more" if len(broken) > 8 else ""
        return text


def make_solution(
    problem: Problem,
    assignment: BoolArray,
    bound: float,
    seconds: float,
    *,
    relaxed: bool = False,
) -> Solution:
    """Builds a `Solution` from an assignment [C, E]: adds value, loads, gap and status.

    Args:
      problem: the problem that was solved.
      assignment: [C, E] bool.
      bound: a valid upper bound on the value.
      seconds: wall time that the solver took.
      relaxed: whether the load bounds were proved to contradict the capacities.
    """
    value = objective(problem, assignment)
    load = expert_load(problem, assignment)
    violation = load_violation(problem, load)
    gap = relative_gap(value, bound, summed_worth(problem, assignment))
    status = "feasible"
    if violation.any() or missing_holders(problem, assignment).any():
        status = "relaxed" if relaxed else "violated"
    elif gap <= GAP_TOLERANCE:
        status = "optimal"
    return Solution(assignment, value, bound, gap, load, violation, status, seconds)


def relative_gap(value: float, bound: float, summed: float) -> float:
    """Computes how far a value is below its bound, relative to the bound, at least 0.

    Args:
      value: value of an assignment.
      bound: upper bound on the value.
      summed: sum of the absolute values of the terms that make up the value.
    """
    excess = bound - value
    if excess <= _ROUNDING * summed:
        return 0.0
    return excess / max(abs(bound), TINY * max(summed, excess), float(np.finfo(np.float64).tiny))


def summed_worth(problem: Problem, assignment: BoolArray) -> float:
    """Sums the absolute values of all terms that make up an assignment's value."""
    of_pairs = problem.fitness[assignment]
    terms = float(of_pairs.sum()) - objective(problem, assignment)
    return float(np.abs(of_pairs).sum()) + terms
