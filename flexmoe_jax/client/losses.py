"""Losses on the routing of a client's examples: even use of its experts, and small gate logits.

Axis legend: `B` routed items, `K` expert slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from flexmoe_jax.client.units import mean_of
from flexmoe_jax.types import Array, Routing


def balance_loss(
    routing: Routing, held: Bool[Array, " E"], valid: Float[Array, " B"]
) -> Float[Array, ""]:
    """Computes the Switch-style load-balance loss over held experts (Fedus et al. 2022, eq. 4).

    Args:
      routing: the routing of a batch.
      held: (E,) bool, the experts held.
      valid: (B,) how much each item counts: 1.0 for an example, 0.0 for padding.

    Returns:
      (): held · Σ_e f_e p_e, where `held` is the number of held experts, `f` the fraction of
      examples routed to each, and `p` its mean probability. The loss is at its minimum if both are
      uniform; it is then 1 for top-1 routing.
    """
    routed = jnp.einsum("be,b->e", routing.selected.astype(valid.dtype), valid)
    fraction = mean_of(routed, valid.sum())
    probability = mean_of(jnp.einsum("be,b->e", routing.probability, valid), valid.sum())
    return held.sum(dtype=fraction.dtype) * jnp.dot(fraction, probability)


def balance_bias_loss(
    routing: Routing, held: Bool[Array, " E"], valid: Float[Array, " B"]
) -> Float[Array, ""]:
    """Computes a term whose gradient moves each held expert's balance bias against its use.

    This is loss-free balancing (Wang et al. 2024, arXiv 2408.15664, algorithm 1) as a gradient: a
    step of SGD with rate η lowers the bias by η if the expert is used more than the mean of those
    held, and raises it by η if it is used less. No other parameter has a gradient.

    Args:
      routing: the routing of a batch, of a layer with balance biases.
      held: (E,) bool, the experts held.
      valid: (B,) how much each item counts: 1.0 for an example, 0.0 for padding.

    Returns:
      (): Σ_e sign(u_e - ū) · (mean biased logit of e), where `u` is the number of examples that
      are routed to each expert and ū its mean over held experts. Only its gradient has a meaning.
    """
    assert routing.biased is not None
    used = jnp.einsum("be,b->e", routing.selected.astype(valid.dtype), valid)
    # Counts are whole numbers: unlike fractions, they are exactly even where use is.
    excess = jnp.sign(held.sum(dtype=used.dtype) * used - used.sum())
    excess = jnp.where(held, excess, 0.0)
    return mean_of(jnp.einsum("e,be,b->", excess, routing.biased, valid), valid.sum())


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
