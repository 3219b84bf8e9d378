"""Weights of units, and the part of each unit that is routed to each expert.

Axis legend: `B` batch, `U` units of an example, `R` axes of a MoE layer's input, `K` slots.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Bool, Float

from flexmoe_jax.errors import InputError
from flexmoe_jax.tasks import Batch, Task
from flexmoe_jax.types import Array


def weights_of(task: Task, batch: Batch, valid: Float[Array, " B"]) -> Float[Array, "B ..."]:
    """Returns the weights (B, U...) of a batch's units; rows that are not valid (B,) weigh 0."""
    weight = task.weight(batch).astype(jnp.float32)
    return weight * valid.reshape(-1, *[1] * (weight.ndim - 1))


def mean_of(total: Float[Array, " ..."], units: Float[Array, " ..."]) -> Float[Array, " ..."]:
    """Computes a mean per unit: the total over the units' weights; 0 of no units is 0."""
    return total / jnp.where(units > 0, units, 1.0)


def fractions(
    selected: Bool[Array, "B *R K"], weight: Float[Array, "B ..."]
) -> Float[Array, "units K"]:
    """Returns the part of each unit routed to each expert, times the unit's weight: (units, K).

    A layer may route items smaller than a unit, such as the pixels of an image: parts of a unit
    then go to different experts. It may route larger items, such as whole texts: all units of an
    example then go to the same experts.

    Args:
      selected: (B, R..., K) bool.
      weight: (B, U...).

    Raises:
      InputError: neither of the axes `R` and `U` begins with the other.
    """
    routed, units = selected.shape[1:-1], weight.shape[1:]
    shorter = min(len(routed), len(units))
    if routed[:shorter] != units[:shorter]:
        remedy = f"what it routes has axes {routed}, the task's units {units}: one must begin alike"
        raise InputError("model", "MoE layer", remedy)
    share = selected.astype(weight.dtype)
    if len(routed) > len(units):
        share = share.mean(axis=tuple(range(1 + len(units), 1 + len(routed))))
    else:
        share = share.reshape(*share.shape[:-1], *[1] * (len(units) - len(routed)), share.shape[-1])
    return (share * weight[..., None]).reshape(-1, share.shape[-1])
