"""One client's part of a round: it receives, trains, answers, and updates its own state.

    own = receive(site, own, download.slots)
    own_after, upload = train_and_answer(site, own, download, arrays, batches)
    own = keep_if_accepted(own, own_after, accepted)

Axis legend: `E` experts, `K` expert slots, `G` groups of MoE layers, `L` MoE layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from flexmoe_jax.client.codec import Codec, decode, encode
from flexmoe_jax.client.training import Batches, Known, Learner, objective, take_batch, train
from flexmoe_jax.client.units import mean_of
from flexmoe_jax.tasks import Batch
from flexmoe_jax.types import Array, Download, Feedback, Own, Params, PyTree, Upload

# Smallest label share of a class, so that no class has probability 0.
_SMOOTHING = 1e-3


def log_shares(label_share: Float[Array | np.ndarray, "*C Y"]) -> Float[Array, "*C Y"]:
    """Computes the logarithm of a client's smoothed label shares (..., Y)."""
    return jnp.log((label_share + _SMOOTHING) / (1 + label_share.shape[-1] * _SMOOTHING))


class Site(NamedTuple):
    """The settings that a client runs with.

    Attributes:
      learner: model, task and training.
      codec: how its updates are compressed.
      group: maps each MoE layer to its group; the layers of a group are assigned together.
      experts: E.
      send_all: whether the client also sends updates of experts that it held but did not use,
        because all holders have the same weight.
    """

    learner: Learner
    codec: Codec
    group: dict[str, int]
    experts: int
    send_all: bool = False


def receive(site: Site, own: Own, slots: Int[Array, "G K"]) -> Own:
    """Updates a client's own state for its new experts.

    The residual of an expert, which compression has not sent yet, moves to the expert's new slot.
    The residual of an expert that the client no longer holds is lost.

    Args:
      site: the client's settings.
      own: its state before.
      slots: (G, K) int32 its new experts.
    """
    if not own.residual:
        return own._replace(slots=slots)
    of_shared, of_experts = own.residual
    same = (slots[:, :, None] == own.slots[:, None, :]).astype(jnp.float32)  # (G, new K, old K)

    def move(layer: str, kept: PyTree) -> PyTree:
        moved = same[site.group[layer]]
        return jax.tree.map(lambda x: jnp.einsum("kj,j...->k...", moved, x), kept)

    return own._replace(
        slots=slots,
        residual=(of_shared, {layer: move(layer, x) for layer, x in of_experts.items()}),
    )


def model_of(site: Site, own: Own, down: Download) -> tuple[Params, dict[str, Array]]:
    """Returns a client's parameters with the experts it received, and the filled slots (K,)."""
    slots = {layer: down.slots[group] for layer, group in site.group.items()}
    gates = {
        layer: jax.tree.map(lambda g, s=slots[layer]: g.at[s].get(mode="clip"), gate)
        for layer, gate in own.gates.items()
    }
    held = {layer: of_layer < site.experts for layer, of_layer in slots.items()}
    return Params(down.shared, down.experts, gates, own.private), held


def train_and_answer(
    site: Site,
    own: Own,
    down: Download,
    arrays: Batch,
    batches: Batches,
    log_share: Float[Array, " Y"] | None = None,
) -> tuple[Own, Upload]:
    """Trains from the server's parameters, and computes the update to send back.

    Args:
      site: the client's settings.
      own: its state, from `receive`.
      down: the server's download.
      arrays: named examples; the batches refer to their rows.
      batches: from `draw_batches`.
      log_share: (Y,) logarithm of its label shares; None if its examples have no labels.

    Returns:
      The client's own state if the server accepts the answer (`keep_if_accepted`), and the answer.
    """
    slots = {layer: down.slots[group] for layer, group in site.group.items()}
    start, held = model_of(site, own, down)
    done = train(site.learner, start, arrays, batches, held, down, log_share)
    idle = done.examples == 0
    change = jax.tree.map(jnp.subtract, (done.params.shared, done.params.experts), start[:2])
    # Slots that are empty, or whose expert has weight 0, are not sent.
    layers = site.learner.layers
    travels = {
        layer: held[layer] if site.send_all else held[layer] & (done.feedback.usage[i] > 0)
        for i, layer in enumerate(layers)
    }
    sent, residual = _send(site, change, travels, own.residual)
    after = Own(
        gates={
            layer: jax.tree.map(
                lambda g, new, s=slots[layer]: g.at[s].set(new, mode="drop"),
                gate,
                done.params.gate[layer],
            )
            for layer, gate in own.gates.items()
        },
        private=done.params.private,
        slots=own.slots,
        residual=residual,
    )
    # Gates and private parameters never leave the client, so only the client can check that they
    # are finite. A NaN loss lets the server refuse the update.
    whole = all_finite((after.gates, after.private))
    upload = Upload(
        *sent,
        feedback=done.feedback,
        loss=jnp.where(whole, mean_of(done.loss, done.units), jnp.nan),
        units=done.units,
        examples=done.examples,
    )
    return keep_if_accepted(own, after, ~idle), upload


def appraise(
    site: Site,
    own: Own,
    down: Download,
    arrays: Batch,
    rows: Int[Array, " B"],
    log_share: Float[Array, " Y"] | None = None,
) -> Feedback:
    """Computes a client's feedback on the experts it received, on one batch, without training.

    Args:
      site: the client's settings.
      own: its state.
      down: the server's download.
      arrays: named examples.
      rows: (B,) int32 rows of the examples, -1 for padding.
      log_share: (Y,) as in `train_and_answer`.

    Returns:
      (L, K) sums per slot, the same as a training step on this batch reports.
    """
    params, held = model_of(site, own, down)
    known = Known(arrays, held, log_share if site.learner.local.prior else None)
    _, seen = objective(site.learner, known, params, *take_batch(arrays, rows))
    return seen.feedback


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """() bool, whether every number of a tree is finite."""
    return jnp.asarray([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)], bool).all()


def keep_if_accepted(before: Own, after: Own, accepted: Bool[Array, ""]) -> Own:
    """Selects a client's own state once it knows whether its answer was accepted: () bool.

    If the answer was refused, the client restores its earlier state, so that its gates and private
    parameters fit the parameters of the server.
    """
    return jax.tree.map(lambda old, new: jnp.where(accepted, new, old), before, after)


def _send(
    site: Site, change: tuple[PyTree, PyTree], travels: dict[str, Array], residual: PyTree
) -> tuple[tuple[PyTree, PyTree], PyTree]:
    """Compresses Δψ and Δθ; returns the encoded updates and the new residual."""
    shared, experts = change[0], select(travels, change[1])
    if residual:
        shared, experts = jax.tree.map(jnp.add, (shared, experts), residual)
        experts = select(travels, experts)
    sent = encode(site.codec, shared, experts)
    if not residual:
        return sent, residual
    arrived = decode(site.codec, sent, (shared, experts))
    kept = jax.tree.map(jnp.subtract, (shared, experts), arrived)
    return sent, (kept[0], select(travels, kept[1], residual[1]))


def select(slots: dict[str, Array], experts: PyTree, others: PyTree | None = None) -> PyTree:
    """Selects by layer: `experts` (K, ...) in the chosen slots (K,), `others` or 0 in the rest."""
    if others is None:
        others = jax.tree.map(jnp.zeros_like, experts)

    def of_layer(layer: str) -> PyTree:
        return jax.tree.map(
            lambda x, y: jnp.where(slots[layer].reshape(-1, *[1] * (x.ndim - 1)), x, y),
            experts[layer],
            others[layer],
        )

    return {layer: of_layer(layer) for layer in experts}
