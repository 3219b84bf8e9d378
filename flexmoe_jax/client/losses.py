"""Losses on the routing of a client's examples: even use of its experts, and small gate logits.

Axis legend: `B` routed items, `K` expert slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from flexmoe_jax.client.units import mean_of
from flexmoe_jax.types import Array, Routing

_LEAST_USE = 0.01


def balance_loss(
    routing: Routing,
    held: Bool[Array, " E"],
    valid: Float[Array, " B"],
    use: Float[Array, " E"] | None = None,
) -> Float[Array, ""]:
    """Computes the Switch-style load-balance loss over held experts (Fedus et al. 2022, eq. 4).

    Args:
      routing: the routing of a batch.
      held: (E,) bool, the experts held.
      valid: (B,) how much each item counts: 1.0 for an example, 0.0 for padding.
      use: (E,) the part of the examples that each expert should get; None for even parts.

    Returns:
      (): Σ_e f_e p_e / y_e, where `f` is the fraction of examples routed to each expert, `p` its
      mean probability, and `y` its part: `use`, or 1 over the number of held experts. The loss is
      at its minimum if f and p equal y; it is then 1 for top-1 routing. A part below 1 % counts as
      1 %, so that the loss stays small.
    """
    routed = jnp.einsum("be,b->e", routing.selected.astype(valid.dtype), valid)
    fraction = mean_of(routed, valid.sum())
    probability = mean_of(jnp.einsum("be,b->e", routing.probability, valid), valid.sum())
    if use is None:
        return held.sum(dtype=fraction.dtype) * jnp.dot(fraction, probability)
    return jnp.dot(fraction, probability / jnp.maximum(use, _LEAST_USE))


def router_z_loss(
    routing: Routing, held: Bool[Array, " E"], valid: Float[Array, " B"]
) -> Float[Array, ""]:
    """Computes the router z-loss, which keeps the gate's logits small (Zoph et al. 2022, eq. 5).

    It is the mean squared log-partition of the gate.

    Args:
      routing: the routing of a batch.
      held: (E,) bool; only these logits count.
      valid: (B,) how much each item counts: 1.0 for an example, 0.0 for padding.

    Returns:
      (): the loss.
    """
    log_z = jax.nn.logsumexp(routing.logits, axis=-1, where=held)
    return mean_of(jnp.dot(jnp.where(held.any(), log_z, 0.0) ** 2, valid), valid.sum())


def router_loss(
    routing: Routing, valid: Float[Array, " B"], slots: Int[Array, " K"]
) -> Float[Array, ""]:
    """Computes the router's cross-entropy, over all E experts, with the client's gate as target.

    Args:
      routing: the routing of a batch, with the router's logits (B, E).
      valid: (B,) how much each item counts: 1.0 for an example, 0.0 for padding.
      slots: (K,) int32 the experts that the client holds.

    Returns:
      (): the loss; it trains only the router.
    """
    assert routing.router is not None
    log_p = jax.nn.log_softmax(routing.router)[:, slots.clip(max=routing.router.shape[-1] - 1)]
    chosen = routing.selected.astype(log_p.dtype)
    chosen = chosen / jnp.maximum(chosen.sum(axis=-1, keepdims=True), 1.0)
    return -mean_of(jnp.dot((chosen * log_p).sum(axis=-1), valid), valid.sum())
