"""Runs the compiled `dual_assign` on a NumPy problem and converts the result back.

Axis legend: `C` clients, `E` experts, `F` features in a client's descriptor.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.assignment.certificate import Prices, effective_bounds
from flexmoe_jax.assignment.dual import dual_assign
from flexmoe_jax.assignment.problem import BoolArray, Problem, largest


class Found(NamedTuple):
    """The device's result: an assignment [C, E] bool and the prices that it is based on."""

    assignment: BoolArray
    prices: Prices


def run_dual(problem: Problem) -> Found:
    """Runs `dual_assign` on the problem, in single precision.

    Fitness and load weights are scaled to a maximum of 1, so that rounding does not depend on their
    units.
    """
    worth = largest(problem.fitness) or 1.0
    load = float(np.max(problem.load_weight, initial=0.0)) or 1.0
    found = _compiled()(*_device_inputs(problem, worth, load), slots=_slots(problem))
    prices, mix = (np.asarray(part, np.float64) for part in found.prices[:2])
    return Found(np.asarray(found.assignment), Prices(prices * (worth / load), mix * worth))


def _slots(problem: Problem) -> int:
    # Round up to a power of two, so that few cohorts trigger a recompilation.
    most = max(1, int(problem.capacity.max(initial=0)))
    return min(problem.experts, 1 << (most - 1).bit_length())


def _device_inputs(problem: Problem, worth: float, load: float) -> tuple[Any, ...]:
    low, high = effective_bounds(problem)
    weight = problem.load_weight if problem.unit is None else problem.unit
    numbers = (
        problem.fitness / worth,
        low / load,
        high / load,
        np.asarray(weight) / load,
        problem.deviation,
        np.asarray(problem.diversity / worth),
    )
    fitness, *others = (jnp.asarray(number, jnp.float32) for number in numbers)
    return fitness, jnp.asarray(problem.capacity, jnp.int32), *others


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return jax.jit(dual_assign, static_argnames="slots")
