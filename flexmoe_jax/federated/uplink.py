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
      norm_limit: greatest L2 norm of an update (ψ and all experts used together); 0 for none.
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
      residual: what compression has kept back of the client's updates; as it was for what did not
        travel.
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
    # Slots that are empty, or whose expert has weight 0, must neither travel nor be judged.
    travels = held if uplink.noise_multiplier else held & (update.feedback.usage > 0)

    def of_travelling(experts: PyTree, others: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x, y: jnp.where(travels.reshape(-1, *[1] * (x.ndim - 1)), x, y), experts, others
        )

    none = jax.tree.map(jnp.zeros_like, update.experts)
    shared, experts, kept = update.shared, of_travelling(update.experts, none), residual
    if not uplink.compressor.lossless:
        shared, experts, kept = compress_update(uplink.compressor, shared, experts, residual)
        experts = of_travelling(experts, none)
        if residual:
            kept = kept[0], of_travelling(kept[1], residual[1])
    shared, experts = jax.tree.map(lambda x: x * tamper, (shared, experts))
    norm = optax.tree.norm((shared, experts))
    # Padding, and clients whose work never arrives, have trained nothing and send nothing.
    idle = update.examples == 0
    refused = jnp.zeros((), bool)
    if uplink.quarantine:
        others = optax.tree.norm((update.gate, update.private, update.loss))
        refused = ~jnp.isfinite(norm + others)
        if uplink.norm_limit:
            refused |= norm > uplink.norm_limit
        refused &= ~idle
    if uplink.clip:
        factor = jnp.minimum(1.0, uplink.clip / jnp.maximum(norm, 1e-12))
        shared, experts = jax.tree.map(lambda x: x * factor, (shared, experts))
    arrived = update._replace(shared=shared, experts=experts)
    void = refused | idle
    nothing = jax.tree.map(jnp.zeros_like, arrived)._replace(gate=start.gate, private=start.private)
    update, kept = jax.tree.map(
        lambda old, new: jnp.where(void, old, new), (nothing, residual), (arrived, kept)
    )
    return Delivery(update, kept, refused)
