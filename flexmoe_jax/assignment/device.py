"""From a problem in NumPy to the compiled `dual_assign` and back.

Axis legend: `C` clients, `E` experts, `F` numbers that describe a client.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.assignment.certificate import Prices, effective_bounds
from flexmoe_jax.assignment.dual import dual_assign
from flexmoe_jax.assignment.problem import BoolArray, Problem


class Found(NamedTuple):
    """What the device found: an assignment [C, E] bool and the prices that it came from."""

    assignment: BoolArray
    prices: Prices


def run_dual(problem: Problem) -> Found:
    """`dual_assign` of the problem, in single precision."""
    found = _compiled()(*_device_inputs(problem), slots=_slots(problem))
    load, mix = (np.asarray(part, np.float64) for part in found.prices[:2])
    return Found(np.asarray(found.assignment), Prices(load, mix))


def _slots(problem: Problem) -> int:
    # Rounded up to a power of two, so that few cohorts compile anew.
    most = max(1, int(problem.capacity.max(initial=0)))
    return min(problem.experts, 1 << (most - 1).bit_length())


def _device_inputs(problem: Problem) -> tuple[Any, ...]:
    low, high = effective_bounds(problem)
    weight = problem.load_weight if problem.unit is None else float(problem.unit)
    descriptor = problem.deviation
    return (
        jnp.asarray(problem.fitness, jnp.float32),
        jnp.asarray(problem.capacity, jnp.int32),
        jnp.asarray(low, jnp.float32),
        jnp.asarray(high, jnp.float32),
        jnp.asarray(weight, jnp.float32),
        jnp.asarray(descriptor, jnp.float32),
        jnp.asarray(problem.diversity, jnp.float32),
    )


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return jax.jit(dual_assign, static_argnames="slots")
