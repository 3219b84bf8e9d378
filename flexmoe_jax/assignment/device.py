"""From a problem in NumPy to the compiled `dual_assign` and back.

Axis legend: `C` clients, `E` experts, `F` numbers that describe a client.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from flexmoe_jax.assignment.certificate import effective_bounds
from flexmoe_jax.assignment.dual import DualSolution, dual_assign
from flexmoe_jax.assignment.problem import Problem


def run_dual(problem: Problem) -> DualSolution:
    """`dual_assign` of the problem, in single precision."""
    return _compiled()(*_device_inputs(problem), slots=_slots(problem))


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
