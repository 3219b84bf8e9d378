"""Admission: the server judges each client's answer before it aggregates the update.

Axis legend: `K` expert slots, `L` MoE layers.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from flexmoe_jax.options.server import Admission
from flexmoe_jax.server import affinity
from flexmoe_jax.server.aggregate import Arrived
from flexmoe_jax.server.quarantine import part_norms
from flexmoe_jax.types import Array, Feedback, Upload


class Verdict(NamedTuple):
    """The server's verdict on one answer.

    Attributes:
      accepted: () bool, whether an answer arrived and was accepted.
      refused: () bool, whether an answer arrived and was refused.
      lengths: (2,) lengths of the update's parts, ψ and experts (see `quarantine`), for refused
        answers too; 0 if a length is not finite or no answer arrived.
      feedback: (L, K) the client's feedback on the experts; 0 unless accepted.
      loss: () mean training loss; 0 unless accepted.
      units: () units trained on; 0 unless accepted.
      examples: () examples trained on; 0 unless accepted.
      sketch: (F,) sketch of Δψ; 0 unless accepted. F is 0 if the server keeps no sketches.
    """

    accepted: Array
    refused: Array
    lengths: Array
    feedback: Feedback
    loss: Array
    units: Array
    examples: Array
    sketch: Array


def admit(
    admission: Admission,
    upload: Upload,
    slots: dict[str, Array],
    steps: Int[Array, ""],
    limits: Float[Array, " 2"] | None,
    sketched: int = 0,
) -> tuple[Arrived, Verdict]:
    """Judges one answer.

    Args:
      admission: the rules.
      upload: the decoded answer; with 0 examples if no answer arrived.
      slots: by MoE layer (K,) int32 the experts that were sent to the client.
      steps: () int32 the local steps that the server asked for.
      limits: (2,) greatest allowed lengths of the two parts, learnt from other updates; None for no
        limits.
      sketched: F, size of the sketch of Δψ.

    Returns:
      The update for the aggregator, all zeros if it was refused, and the verdict.
    """
    shared, experts = upload.shared, upload.experts
    norms = part_norms(shared, experts)
    reach = jnp.sqrt(jnp.maximum(steps, 1).astype(jnp.float32))
    idle = upload.examples == 0
    refused = ~idle & _refuse(admission, upload.loss, norms, limits, reach)
    if admission.clip:
        factor = jnp.minimum(1.0, admission.clip / jnp.maximum(_together(norms), 1e-12))
        shared, experts = jax.tree.map(lambda x: x * factor, (shared, experts))
    # No experts are sent for a layer whose experts stay with their clients.
    usage = {x: upload.feedback.usage[i] for i, x in enumerate(slots) if x in experts}
    weight = upload.units
    accepted = ~(refused | idle)
    counted = shared, experts, weight, usage, upload.feedback, upload.loss, upload.examples
    # A branch, not a `where`: XLA would merge it into the sum of all updates, and round that in
    # another way in a simulation than on a real server. So both have the same model, bit for bit.
    shared, experts, weight, usage, feedback, loss, examples = lax.cond(
        accepted, lambda x: x, partial(jax.tree.map, jnp.zeros_like), counted
    )
    units = weight
    if admission.private:
        weight, usage = jax.tree.map(jnp.ones_like, (weight, usage))
    lengths = jnp.where(idle | ~jnp.isfinite(norms), 0.0, norms / reach)
    sketch = affinity.sketch(shared, sketched)
    verdict = Verdict(accepted, refused, lengths, feedback, loss, units, examples, sketch)
    of_sent = {layer: slots[layer] for layer in experts}
    return Arrived(shared, experts, of_sent, weight, usage), verdict


def _refuse(
    admission: Admission, loss: Array, norms: Array, limits: Array | None, reach: Array
) -> Array:
    """Whether an answer is refused, by its own norms and the limits from other updates: () bool."""
    refused = jnp.zeros((), bool)
    if admission.quarantine or admission.clip or admission.norm_limit:
        refused = ~jnp.isfinite(norms.sum() + loss)
    if admission.compares and limits is not None:
        refused |= (norms > limits * reach).any()
    if admission.norm_limit:
        refused |= _together(norms) > admission.norm_limit
    return refused


def _together(norms: Array) -> Array:
    return jnp.sqrt((norms**2).sum())
