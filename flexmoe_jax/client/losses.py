"""Losses on where a client's examples go: they keep its experts in even use and its gate small.

Axis legend: `B` what is routed, one by one, `K` expert slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flexmoe_jax.types import Array, Routing


def balance_loss(routing: Routing, held: Array, valid: Array) -> Array:
    """Switch-style load-balance loss over the experts held (Fedus et al. 2022, eq. 4).

    Args:
      routing: of a batch.
      held: (E,) bool.
      valid: (B,) 1.0 for examples that count, 0.0 for padding.

    Returns:
      (): held · Σ_e f_e p_e, at its minimum when both the fraction of examples routed to each held
      expert `f` and the mean probability `p` are uniform; then 1 for top-1 routing.
    """
    count = jnp.maximum(valid.sum(), 1.0)
    fraction = jnp.einsum("be,b->e", routing.selected.astype(valid.dtype), valid) / count
    probability = jnp.einsum("be,b->e", routing.probability, valid) / count
    return held.sum() * jnp.dot(fraction, probability)


def router_z_loss(routing: Routing, held: Array, valid: Array) -> Array:
    """Mean squared log-partition of the gate (Zoph et al. 2022, eq. 5): keeps its logits small.

    Args:
      routing: of a batch.
      held: (E,) bool; only these logits count.
      valid: (B,) 1.0 for examples that count, 0.0 for padding.

    Returns:
      (): the loss.
    """
    log_z = jax.nn.logsumexp(routing.logits, axis=-1, where=held)
    return jnp.dot(jnp.where(held.any(), log_z, 0.0) ** 2, valid) / jnp.maximum(valid.sum(), 1.0)
