"""Assignment of several MoE layers at once.

If capacity is a number of experts per layer, layers do not compete and are solved one by one. With
expert sizes, a client's capacity is one budget for all its layers, and the layers become one
problem with G·E experts.

Axis legend: `G` layers, `C` clients, `E` experts of a layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from flexmoe_jax.assignment.engine import solve
from flexmoe_jax.assignment.problem import Problem
from flexmoe_jax.assignment.solution import Solution, relative_gap, summed_worth
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.assignment import AssignmentOptions

_WORST_LAST = ("optimal", "feasible", "relaxed", "violated")


def solve_layers(
    fitness: npt.ArrayLike,
    capacity: npt.ArrayLike,
    load_min: npt.ArrayLike,
    load_max: npt.ArrayLike,
    *,
    expert_size: npt.ArrayLike | None = None,
    solver: str = AssignmentOptions.solver,
    rounding: str = "repair",
    seed: int = 0,
    **fields: Any,
) -> Solution:
    """Solves an assignment problem with a leading axis of layers.

    Args:
      fitness: [G, C, E].
      capacity: number of experts that each client holds in each layer, [C] or [G, C]; with
        `expert_size`, [C], the limit on the total size of a client's experts in all layers.
      load_min: minimum load, a scalar, [E] or [G, E].
      load_max: maximum load, a scalar, [E] or [G, E].
      expert_size: size of the experts, [E] or [G, E], or None.
      solver: as in `solve`.
      rounding: as in `solve`.
      seed: as in `solve`.
      **fields: other fields of `Problem`, the same for every layer; not with `expert_size`.

    Returns:
      A solution whose arrays have the layers as first axis. Value and bound are sums over the
      layers, and the status is the worst status of any layer.

    Raises:
      InputError: a wrong shape, or an input that `Problem` or `solve` rejects.
    """
    worth = np.asarray(fitness, np.float64)
    if worth.ndim != 3 or worth.shape[0] == 0:
        raise InputError("fitness", worth.shape, "give a (G, C, E) array with at least 1 layer")
    layers, clients, experts = worth.shape
    low, high = (
        _spread(name, b, (layers, experts))
        for name, b in (("load_min", load_min), ("load_max", load_max))
    )
    if expert_size is None:
        held = _spread("capacity", capacity, (layers, clients))
        problems = [Problem(worth[g], held[g], low[g], high[g], **fields) for g in range(layers)]
        parts = [solve(problem, solver, rounding, seed + g) for g, problem in enumerate(problems)]
        return _stack(problems, parts)
    if fields:
        raise InputError(next(iter(fields)), "given", "leave it out where layers share a budget")
    size = _spread("expert_size", expert_size, (layers, experts))
    beside = worth.transpose(1, 0, 2).reshape(clients, layers * experts)
    joint = Problem(
        beside, np.asarray(capacity), low.ravel(), high.ravel(), expert_size=size.ravel()
    )
    return _by_layer(solve(joint, solver, rounding, seed), layers)


def _by_layer(joint: Solution, layers: int) -> Solution:
    """Reshapes a solution over G·E experts, with the layers as first axis."""
    clients = len(joint.assignment)
    return replace(
        joint,
        assignment=joint.assignment.reshape(clients, layers, -1).swapaxes(0, 1),
        load=joint.load.reshape(layers, -1),
        violation=joint.violation.reshape(layers, -1),
    )


def _spread(name: str, value: npt.ArrayLike, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    try:
        return np.broadcast_to(np.asarray(value, np.float64), shape)
    except ValueError:
        raise InputError(name, np.shape(value), f"give a scalar, {shape[1:]} or {shape}") from None


def _stack(problems: list[Problem], parts: list[Solution]) -> Solution:
    """Joins the layers' solutions, with the layers as first axis."""
    pairs = zip(problems, parts, strict=True)
    summed = sum(summed_worth(problem, part.assignment) for problem, part in pairs)
    value, bound = sum(part.value for part in parts), sum(part.bound for part in parts)
    return Solution(
        np.stack([part.assignment for part in parts]),
        value,
        bound,
        relative_gap(value, bound, summed),
        np.stack([part.load for part in parts]),
        np.stack([part.violation for part in parts]),
        max((part.status for part in parts), key=_WORST_LAST.index),
        sum(part.seconds for part in parts),
    )
