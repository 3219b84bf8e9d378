"""What happens to a client's update on its way into the server's sums.

Compression on the client, tampering on the way, and on the server quarantine and clipping: pure
functions of one client's update, which `execute` maps over a block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from flexmoe_jax.federated.client import ClientUpdate
from flexmoe_jax.federated.compress import Compressor, compress_update, make_compressor
from flexmoe_jax.types import Array, Params, PyTree


class Uplink(NamedTuple):
    """How updates travel, and what the server makes of each.

    Attributes:
      compressor: of the updates.
      error_feedback: whether what compression loses is added to the client's next update.
      quarantine: whether an update that is not all numbers, or longer than `norm_limit`, is
        refused.
      norm_limit: greatest L2 norm of an update (ψ and all held experts together); 0 for none.
      clip: L2 norm to which longer updates are cut; 0 for none.
      noise_multiplier: deviation of the server's noise over `clip` (see `privacy`), under which
        every client weighs the same; 0 for none.
    """

    compressor: Compressor = make_compressor("none")
    error_feedback: bool = True
    quarantine: bool = True
    norm_limit: float = 0.0
    clip: float = 0.0
    noise_multiplier: float = 0.0


class Delivery(NamedTuple):
    """An update as it reaches the server's sums.

    Attributes:
      update: with nothing in it (no examples, no usage, no change) if it was refused.
      residual: what compression has kept back of the client's updates.
      quarantined: () bool, it was refused.
    """

    update: ClientUpdate
    residual: PyTree
    quarantined: Array


def deliver(
    uplink: Uplink,
    update: ClientUpdate,
    held: Array,
    start: Params,
    residual: PyTree,
    tamper: Array,
) -> Delivery:
    """Takes one client's update to the server.

    Args:
      uplink: how.
      update: of the client.
      held: (K,) bool, slots that hold an expert.
      start: the client's parameters before it trained; if its update is refused, it goes back to
        the gate and the private ones of these.
      residual: from its earlier updates.
      tamper: () factor on the update.

    Returns:
      What the server gets.
    """
    # Empty slots trained nothing that counts; what they hold must neither travel nor be judged.
    experts = jax.tree.map(
        lambda x: jnp.where(held.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0), update.experts
    )
    shared, kept = update.shared, residual
    if not uplink.compressor.lossless:
        shared, experts, kept = compress_update(uplink.compressor, shared, experts, residual)
    shared, experts = jax.tree.map(lambda x: x * tamper, (shared, experts))
    norm = optax.tree.norm((shared, experts, update.loss))
    refused = jnp.zeros((), bool)
    if uplink.quarantine:
        refused = ~jnp.isfinite(norm + optax.tree.norm((update.gate, update.private)))
        if uplink.norm_limit:
            refused |= norm > uplink.norm_limit
    if uplink.clip:
        length = optax.tree.norm((shared, experts))
        factor = jnp.minimum(1.0, uplink.clip / jnp.maximum(length, 1e-12))
        shared, experts = jax.tree.map(lambda x: x * factor, (shared, experts))
    arrived = update._replace(shared=shared, experts=experts)
    if not uplink.quarantine:
        return Delivery(arrived, kept, refused)
    nothing = jax.tree.map(jnp.zeros_like, arrived)._replace(gate=start.gate, private=start.private)
    update, kept = jax.tree.map(
        lambda old, new: jnp.where(refused, old, new), (nothing, residual), (arrived, kept)
    )
    return Delivery(update, kept, refused)
