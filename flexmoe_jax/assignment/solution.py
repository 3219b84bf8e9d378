"""Solutions: an assignment, and what can be said of it.

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

# A relative gap below this is rounding error of the solvers, so the answer counts as optimal.
GAP_TOLERANCE = 1e-6
# What adding worths up may be wrong by, relative to the sum of their sizes.
_ROUNDING = 8 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Solution:
    """An assignment with its certificate.

    Attributes:
      assignment: [C, E] bool, who holds which expert.
      value: `Σ Q_ce x_ce` of the assignment, less the balance and diversity terms where asked for.
      bound: no assignment within the load bounds is worth more than this; where `status` is
        `relaxed`, within the bounds as they gave way.
      gap: `(bound - value) / |bound|`, at least 0, whatever the unit of fitness is. Where worths
        cancel to nearly nothing, |bound| counts as 1e-12 of what is summed.
      load: [E] load of each expert.
      violation: [E] how far each load lies outside its bounds, ≥ 0, in units of load.
      status: `optimal` (within the bounds, no gap), `feasible` (within the bounds), `relaxed`
        (not all bounds can hold; some gave way) or `violated` (bounds that could hold do not:
        by rounding, within its guarantee, or because the solver ignores them). Policies add
        `fallback: REASON` where the solver failed and experts were dealt out instead.
      seconds: wall time that the solver took.
    """

    assignment: BoolArray
    value: float
    bound: float
    gap: float
    load: FloatArray
    violation: FloatArray
    status: str
    seconds: float

    def __str__(self) -> str:
        """One readable line."""
        *layers, clients, experts = self.assignment.shape
        size = f"{layers[0]} layers x " if layers else ""
        text = (
            f"{self.status}: {size}{clients} clients x {experts} experts, value {self.value:.6g}, "
            f"bound {self.bound:.6g}, gap {self.gap:.2%}, "
            f"load {self.load.min():.6g} to {self.load.max():.6g}, {self.seconds:.3f} s"
        )
        violation = self.violation.ravel()
        broken = np.flatnonzero(violation)
        if broken.size:
            text += "; out of bounds: " + ", ".join(
                f"expert {e} by {violation[e]:.6g}" for e in broken[:8]
            )
            text += f" and {broken.size - 8} more" if broken.size > 8 else ""
        return text


def make_solution(
    problem: Problem,
    assignment: BoolArray,
    bound: float,
    seconds: float,
    *,
    relaxed: bool = False,
) -> Solution:
    """Completes an assignment [C, E] to a `Solution`, with value, loads, gap and status.

    Args:
      problem: what was solved.
      assignment: [C, E] bool.
      bound: a valid upper bound on the value.
      seconds: what the solver took.
      relaxed: whether the load bounds were shown to contradict the capacities.
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
    """How far a value is below its bound, relative to the bound, at least 0.

    Args:
      value: of an assignment.
      bound: on it.
      summed: sum of the sizes of the worths that make up the value, whatever their signs.
    """
    excess = bound - value
    if excess <= _ROUNDING * summed:
        return 0.0
    return excess / max(abs(bound), TINY * max(summed, excess), float(np.finfo(np.float64).tiny))


def summed_worth(problem: Problem, assignment: BoolArray) -> float:
    """Sum of the sizes of all worths that an assignment's value is made of."""
    of_pairs = float(np.sum(np.abs(problem.fitness), where=assignment))
    terms = float(np.sum(problem.fitness, where=assignment)) - objective(problem, assignment)
    return of_pairs + terms
