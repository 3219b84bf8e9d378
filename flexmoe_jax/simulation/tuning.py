"""Fine-tunes each client's model for that client alone.

Axis legend: `C` clients.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flexmoe_jax import client, server
from flexmoe_jax.data import ClientData
from flexmoe_jax.federation import Federation
from flexmoe_jax.simulation.blocks import (
    WHOLE,
    over_blocks,
    over_devices,
    resolve_block_size,
    take_rows,
)
from flexmoe_jax.simulation.exchange import OF_STATE, fetch_own
from flexmoe_jax.simulation.plan import Floor
from flexmoe_jax.simulation.rows import ALL_STEPS, Row, draw_rows
from flexmoe_jax.types import Array, Params, Plan, State


def tune(
    federation: Federation, floor: Floor, mesh: Mesh, state: State, data: ClientData
) -> Params:
    """Trains every client's model (C, ...) once more, for that client alone; no update is sent.

    This shows how much of a method's lead remains once clients may fit any model to their own
    examples (Yu et al. 2020). A client trains the experts that it holds now, as in a first round:
    at the full learning rate, which by the end of a run may have fallen to 0 (`local.decay`), and
    with a balance loss for even parts. A client without experts does not train.

    Args:
      federation: the configuration of the federation.
      floor: the layout in which cohorts train.
      mesh: devices that share the clients.
      state: of the federation; it is not changed.
      data: of all clients.
    """
    site, desk, clients = federation.site, federation.desk, federation.clients
    fetch = fetch_own(mesh)
    key = jax.random.fold_in(state.server.key, state.server.round)
    size = resolve_block_size(floor.block_size, clients, mesh.size)
    room = floor._replace(rows=clients, block_size=size).padded

    def tune_share(numbers: Array, known: tuple[State, ClientData]) -> tuple[None, Params]:
        state, data = known
        slots = take_rows(state.clients.slots, numbers)
        has = (slots < federation.layout.experts).any(axis=(1, 2))
        steps = jnp.where(has, ALL_STEPS, 0)
        nothing: Any = None
        plan = Plan(numbers, slots, nothing, steps, nothing)

        def visit(row: Row) -> tuple[tuple[()], Params]:
            own = take_rows(state.clients, row.number)
            down = server.send(desk, state.server, row.slots, row.steps, fetch)
            down = down._replace(round=jnp.zeros_like(down.round))
            start, held = client.model_of(site, own, down)
            done = client.train(
                site.learner, start, data.arrays, row.batches, held, down, row.log_share
            )
            return (), done.params

        rows = draw_rows(federation, data, plan, key)
        return None, over_blocks(visit, lambda total, _: total, (), rows, size)[1]

    numbers, known = jnp.arange(room, dtype=jnp.int32), (state, data)
    of_known = OF_STATE, WHOLE
    _, tuned = over_devices(tune_share, numbers, known, mesh, of_whole=of_known)
    models: Params = jax.tree.map(lambda x: x[:clients], tuned)
    return models
