"""Units: what is judged one by one, and which part of each went to which expert.

Axis legend: `B` batch, `U` units of an example, `R` axes of what reaches a MoE layer, `K` slots.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Bool, Float

from flexmoe_jax.errors import InputError
from flexmoe_jax.tasks import Batch, Task
from flexmoe_jax.types import Array


def weights_of(task: Task, batch: Batch, valid: Float[Array, " B"]) -> Float[Array, "B ..."]:
    """(B, U...) how much each unit of a batch counts, of whose rows (B,) some are padding."""
    weight = task.weight(batch).astype(jnp.float32)
    return weight * valid.reshape(-1, *[1] * (weight.ndim - 1))


def fractions(
    selected: Bool[Array, "B *R K"], weight: Float[Array, "B ..."]
) -> Float[Array, "units K"]:
    """The part of each unit that went to each expert, times the unit's weight: (units, K).

    A layer may route what is finer than a unit, as the pixels of a picture: then a unit goes to
    experts in parts. Or coarser, as whole texts: then all units of an example go the same way.

    Args:
      selected: (B, R..., K) bool.
      weight: (B, U...).

    Raises:
      InputError: the axes `R` are neither the units' with others behind, nor the first of them.
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
