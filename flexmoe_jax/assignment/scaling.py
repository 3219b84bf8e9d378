"""Rescales problems to units in which every number is near 1.

Solvers have absolute tolerances near 1e-9. Results must not depend on the units in which fitness,
load, descriptors or sizes are given. So each is divided by a power of two, which is exact. A client
holds the same number of experts in every assignment, so a constant in its row of the fitness does
not affect the answer. It is subtracted, because it would cost precision.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from flexmoe_jax.assignment.problem import FloatArray, IntArray, Problem, largest

# Limits: larger bounds, in units of the largest weight or size, are all equivalent; and double
# precision cannot represent larger ratios of violation weights.
_BEYOND = 2.0**200
_PRIORITY = 2.0**40


class Scaled(NamedTuple):
    """A problem in units near 1.

    Attributes:
      problem: has the same answers; its largest fitness, price or weight is between 0.5 and 2.
      exponent: one unit of its value is `2**exponent` units of the original problem's value.
    """

    problem: Problem
    exponent: int


def rescale(problem: Problem) -> Scaled:
    """Rescales a problem to units near 1; answers and differences between their values are kept.

    If the unit of any quantity changes by a power of two, the returned problem is the same. Without
    expert sizes, the same holds if a constant is added to a row of the fitness.
    """
    worth = problem.fitness
    if problem.clients and problem.expert_size is None:
        worth = worth - worth.max(axis=1, keepdims=True)
    of_load, of_mix = _exponent(problem.load_weight), _exponent(problem.deviation)
    # Scale of each term's contribution for one pair.
    balance = math.ldexp(problem.balance, 2 * of_load)
    diversity = math.ldexp(problem.diversity, of_mix)
    exponent = _exponent(np.array([largest(worth), balance, diversity])) + 1
    fields: dict[str, Any] = {
        "fitness": _divided(worth, exponent),
        "load_weight": _divided(problem.load_weight, of_load),
        "load_min": _near(problem.load_min, of_load),
        "load_max": np.where(np.isinf(problem.load_max), np.inf, _near(problem.load_max, of_load)),
        "balance": math.ldexp(balance, -exponent),
        "diversity": math.ldexp(diversity, -exponent),
    }
    if problem.balance:
        # Set the target explicitly: its default depends on fields whose units change here, such as
        # the capacity.
        fields["target"] = _divided(problem.load_target, of_load)
    if problem.descriptor is not None:
        fields["descriptor"] = _divided(problem.deviation, of_mix)
    if problem.expert_size is not None:
        of_size = _exponent(problem.expert_size)
        fields["expert_size"] = _divided(problem.expert_size, of_size)
        fields["capacity"] = _near(problem.capacity, of_size)
    priority = np.asarray(problem.violation_weight)
    priority = _divided(priority, _exponent(priority.min()))
    fields["violation_weight"] = np.minimum(priority, _PRIORITY)
    return Scaled(replace(problem, **fields), exponent)


def _exponent(values: float | FloatArray) -> int:
    """Returns the exponent n for which the largest |value| / 2**n is in [1, 2); 0 for zeros."""
    most = largest(values)
    return math.frexp(most)[1] - 1 if most else 0


def _divided(values: float | FloatArray | IntArray, exponent: int) -> FloatArray:
    return np.ldexp(values, -exponent) if exponent else np.asarray(values, np.float64)


def _near(values: FloatArray | IntArray, exponent: int) -> FloatArray:
    with np.errstate(over="ignore"):
        return np.clip(_divided(values, exponent), -_BEYOND, _BEYOND)
