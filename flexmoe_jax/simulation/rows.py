"""The clients of a plan, with what each draws for the round.

Axis legend: `C` clients, `P` clients of the plan, `K` expert slots, `G` groups of MoE layers.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flexmoe_jax import client
from flexmoe_jax.data import ClientData
from flexmoe_jax.federation import Federation
from flexmoe_jax.simulation.blocks import take_rows
from flexmoe_jax.simulation.plan import Tampering
from flexmoe_jax.types import Array, Key, Plan

# Identifies the random stream of a faulty client's noise; it is folded into the client's key.
_NOISE_OF_CLIENT = 0xC11E
ALL_STEPS = 2**31 - 1
"""More steps than any client has in a round."""


class Row(NamedTuple):
    """One client of a plan.

    Attributes:
      number: () int32 its id; C for padding.
      slots: (G, K) int32 the experts that it receives.
      steps: () int32 the local steps that it completes and delivers.
      batches: the batches that it trains on.
      log_share: (Y,) logarithm of its label shares; None if training does not use them.
      tampering: how its update is altered: factor (), noise () or None.
      key: for that noise.
      use: (G, K) the part of its units for each expert; None for even parts.
    """

    number: Array
    slots: Array
    steps: Array
    batches: client.Batches
    log_share: Array | None
    tampering: Tampering
    key: Key
    use: Array | None


def draw_rows(federation: Federation, data: ClientData, plan: Plan, key: Key) -> Row:
    """Draws the batches of the clients (P,) of a plan, or of a device's share.

    Args:
      federation: the configuration of the federation.
      data: of all clients, or of the plan's.
      plan: the round's plan.
      key: of the round.

    Returns:
      The clients, leaves (P, ...).
    """
    numbers = plan.clients
    index = take_rows(data.index, numbers)
    size = jnp.where(numbers < federation.clients, take_rows(data.size, numbers), 0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    batches = jax.vmap(partial(client.draw_batches, federation.local))(keys, index, size)
    log_share = None
    if federation.local.prior and data.label_share.shape[1]:
        log_share = client.log_shares(take_rows(data.label_share, numbers))
    return Row(
        number=numbers,
        slots=plan.slots,
        steps=jnp.minimum(federation.local.steps(size), plan.steps),
        batches=batches,
        log_share=log_share,
        tampering=Tampering(plan.tamper, plan.noise),
        key=jax.vmap(jax.random.fold_in, (0, None))(keys, _NOISE_OF_CLIENT),
        use=plan.use,
    )
