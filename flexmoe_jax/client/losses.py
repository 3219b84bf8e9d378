"""Losses on where a client's examples go: they keep its experts in even use and its gate small.

Axis legend: `B` what is routed, one by one, `K` expert slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from flexmoe_jax.types import Array, Routing


def balance_loss(
    routing: Routing, held: Bool[Array, " E"], valid: Float[Array, " B"]
) -> Float[Array, ""]:
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
    return held.sum(dtype=fraction.dtype) * jnp.dot(fraction, probability)


def router_z_loss(
    routing: Routing, held: Bool[Array, " E"], valid: Float[Array, " B"]
) -> Float[Array, ""]:
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


def router_loss(
    routing: Routing, valid: Float[Array, " B"], slots: Int[Array, " K"]
) -> Float[Array, ""]:
    """Cross-entropy of the router, over all E experts, with where the client's own gate sends.

    Args:
      routing: of a batch, with the router's logits (B, E).
      valid: (B,) 1.0 for examples that count, 0.0 for padding.
      slots: (K,) int32 the experts that the client holds.

    Returns:
      (): the loss, of which only the router learns.
    """
    assert routing.router is not None
    log_p = jax.nn.log_softmax(routing.router)[:, slots.clip(max=routing.router.shape[-1] - 1)]
    chosen = routing.selected.astype(log_p.dtype)
    chosen = chosen / jnp.maximum(chosen.sum(axis=-1, keepdims=True), 1.0)
    return -jnp.dot((chosen * log_p).sum(axis=-1), valid) / jnp.maximum(valid.sum(), 1.0)
