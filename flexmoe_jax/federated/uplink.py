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
from flexmoe_jax.federated.quarantine import part_norms
from flexmoe_jax.types import Array, Key, Params, PyTree


class Uplink(NamedTuple):
    """How updates travel, and what the server makes of each.

    Attributes:
      compressor: of the updates.
      error_feedback: whether what compression loses is added to the client's next update.
      quarantine: whether an update is refused that is not all numbers, or too long by one of the
        two limits below.
      norm_factor: how many times the median of lately an update may be long, ψ and experts each by
        itself (see `quarantine`); 0 for any length. Under `noise_multiplier` it does not count: a
        limit learnt from clients would tell of them.
      norm_limit: greatest L2 norm of an update (ψ and all experts used together); 0 for none.
      clip: L2 norm to which longer updates are cut; 0 for none. An update that is not all numbers
        cannot be cut, and is refused, quarantine or not.
      noise_multiplier: deviation of the server's noise over `clip` (see `privacy`), under which
        every client weighs the same; 0 for none.
      simulated_noise: whether that noise comes from the run's key, and not from a secret.
    """

    compressor: Compressor = make_compressor("none")
    error_feedback: bool = True
    quarantine: bool = True
    norm_factor: float = 10.0
    norm_limit: float = 0.0
    clip: float = 0.0
    noise_multiplier: float = 0.0
    simulated_noise: bool = False

    @property
    def compares(self) -> bool:
        """Whether updates are judged by what others' were like."""
        return bool(self.quarantine and self.norm_factor and not self.noise_multiplier)


class Tampering(NamedTuple):
    """What one faulty client's update suffers.

    Attributes:
      factor: () on the update; 1 for an honest client.
      noise: () L2 norm of the Gaussian noise added to it, over its own; None for none.
      key: of that noise.
    """

    factor: Array
    noise: Array | None = None
    key: Key | None = None


class Delivery(NamedTuple):
    """An update as it reaches the server's sums.

    Attributes:
      update: with nothing in it (no examples, no usage, no change) if it was refused.
      residual: what compression has kept back of the client's updates; as it was for what did not
        travel.
      quarantined: () bool, it was refused.
      norms: (2,) L2 norms of its two parts, ψ and experts, as they arrived; 0 where that is not a
        number, and of what never arrived.
    """

    update: ClientUpdate
    residual: PyTree
    quarantined: Array
    norms: Array


def deliver(
    uplink: Uplink,
    update: ClientUpdate,
    held: Array,
    start: Params,
    residual: PyTree,
    tampering: Tampering,
    limits: Array,
) -> Delivery:
    """Takes one client's update to the server.

    Args:
      uplink: how.
      update: of the client.
      held: (K,) bool, slots that hold an expert.
      start: the client's parameters before it trained; if its update is refused, it goes back to
        the gate and the private ones of these.
      residual: from its earlier updates.
      tampering: with the update.
      limits: (2,) greatest norms of the two parts that others' updates allow.

    Returns:
      What the server gets.
    """
    # Slots that are empty, or whose expert has weight 0, must neither travel nor be judged.
    travels = held if uplink.noise_multiplier else held & (update.feedback.usage > 0)
    sent, kept = _encode(uplink, update, travels, residual)
    shared, experts = tamper(sent, travels, tampering)
    norms = part_norms(shared, experts)
    # Padding, and clients whose work never arrives, have trained nothing and send nothing.
    idle = update.examples == 0
    refused = ~idle & judge(uplink, update, norms, limits)
    if uplink.clip:
        factor = jnp.minimum(1.0, uplink.clip / jnp.maximum(_together(norms), 1e-12))
        shared, experts = jax.tree.map(lambda x: x * factor, (shared, experts))
    arrived = update._replace(shared=shared, experts=experts)
    void = refused | idle
    nothing = jax.tree.map(jnp.zeros_like, arrived)._replace(gate=start.gate, private=start.private)
    update, kept = jax.tree.map(
        lambda old, new: jnp.where(void, old, new), (nothing, residual), (arrived, kept)
    )
    return Delivery(update, kept, refused, jnp.where(idle | ~jnp.isfinite(norms), 0.0, norms))


def _encode(
    uplink: Uplink, update: ClientUpdate, travels: Array, residual: PyTree
) -> tuple[tuple[PyTree, PyTree], PyTree]:
    """Δψ and Δθ as they would arrive, and what compression keeps back of them."""
    none = jax.tree.map(jnp.zeros_like, update.experts)
    shared, experts, kept = update.shared, _select(travels, update.experts, none), residual
    if not uplink.compressor.lossless:
        shared, experts, kept = compress_update(uplink.compressor, shared, experts, residual)
        experts = _select(travels, experts, none)
        if residual:
            kept = kept[0], _select(travels, kept[1], residual[1])
    return (shared, experts), kept


def tamper(
    sent: tuple[PyTree, PyTree], travels: Array, tampering: Tampering
) -> tuple[PyTree, PyTree]:
    """What a faulty client makes of its update: so many times as long, and drowned in noise.

    Args:
      sent: Δψ and Δθ, leaves (...) and (K, ...).
      travels: (K,) bool, slots of which anything is sent.
      tampering: of this client.
    """
    changed = jax.tree.map(lambda x: x * tampering.factor, sent)
    if tampering.noise is None:
        return changed
    noise = optax.tree.random_like(tampering.key, sent, jax.random.normal)
    noise = noise[0], _select(travels, noise[1], jax.tree.map(jnp.zeros_like, noise[1]))
    length = tampering.noise * optax.tree.norm(sent) / jnp.maximum(optax.tree.norm(noise), 1e-12)
    return jax.tree.map(lambda x, n: x + length * n, changed, noise)


def judge(uplink: Uplink, update: ClientUpdate, norms: Array, limits: Array) -> Array:
    """Whether the server refuses an update, by its norms and what it knows of others': () bool."""
    refused = jnp.zeros((), bool)
    if uplink.quarantine or uplink.clip:
        others = optax.tree.norm((update.gate, update.private, update.loss))
        refused = ~jnp.isfinite(norms.sum() + others)
    if uplink.compares:
        refused |= (norms > limits).any()
    if uplink.quarantine and uplink.norm_limit:
        refused |= _together(norms) > uplink.norm_limit
    return refused


def _together(norms: Array) -> Array:
    return jnp.sqrt((norms**2).sum())


def _select(slots: Array, experts: PyTree, others: PyTree) -> PyTree:
    """Leaves (K, ...) of the slots chosen (K,), and the others of the rest."""
    return jax.tree.map(
        lambda x, y: jnp.where(slots.reshape(-1, *[1] * (x.ndim - 1)), x, y), experts, others
    )
