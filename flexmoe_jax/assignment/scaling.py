"""Problems in units in which every number is near 1.

Solvers have tolerances: absolute ones, near 1e-9. So that none of them depends on the unit in which
fitness, load, descriptors or sizes are given, each is divided by a power of two, which is exact.
And since every client holds as many experts whatever happens, a constant in its row of the fitness
decides nothing: it is taken off, before it costs digits.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from flexmoe_jax.assignment.problem import FloatArray, IntArray, Problem

# Beyond this, in units of the largest weight or size, one bound says as much as another; and
# priorities that are further apart than that are in no double's reach.
_BEYOND = 2.0**200
_PRIORITY = 2.0**40


class Scaled(NamedTuple):
    """A problem in units near 1.

    Attributes:
      problem: with the same answers; its largest fitness, price or weight lies between 0.5 and 2.
      exponent: one unit of its worth is `2**exponent` of the given one.
    """

    problem: Problem
    exponent: int


def rescale(problem: Problem) -> Scaled:
    """The problem in units near 1: the same answers, and the same differences between their worths.

    A power of two in any field, or a constant added to a row of the fitness, makes no difference
    to what comes back.
    """
    worth = problem.fitness
    if problem.clients and problem.expert_size is None:
        worth = worth - worth.max(axis=1, keepdims=True)
    of_load, of_mix = _exponent(problem.load_weight), _exponent(problem.deviation)
    # What one pair can be worth by each of the terms.
    balance = math.ldexp(problem.balance, 2 * of_load)
    diversity = math.ldexp(problem.diversity, of_mix)
    exponent = _exponent(np.array([np.max(np.abs(worth), initial=0.0), balance, diversity])) + 1
    fields: dict[str, Any] = {
        "fitness": _divided(worth, exponent),
        "load_weight": _divided(problem.load_weight, of_load),
        "load_min": _near(problem.load_min, of_load),
        "load_max": np.where(np.isinf(problem.load_max), np.inf, _near(problem.load_max, of_load)),
        "balance": math.ldexp(balance, -exponent),
        "diversity": math.ldexp(diversity, -exponent),
    }
    if problem.balance:
        # What the default is made of, capacities among it, may be in other units now.
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
    """The power of two that brings the largest of the values to between 1 and 2; 0 for zeros."""
    largest = float(np.max(np.abs(values), initial=0.0))
    return math.frexp(largest)[1] - 1 if largest else 0


def _divided(values: float | FloatArray | IntArray, exponent: int) -> FloatArray:
    return np.ldexp(values, -exponent) if exponent else np.asarray(values, np.float64)


def _near(values: FloatArray | IntArray, exponent: int) -> FloatArray:
    with np.errstate(over="ignore"):
        return np.clip(_divided(values, exponent), -_BEYOND, _BEYOND)
