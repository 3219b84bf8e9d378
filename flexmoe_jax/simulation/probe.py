"""What clients say of every expert on a few of their batches, whatever they have room for.

Axis legend: `n` clients, `E` experts, `K` expert slots, `G` groups of MoE layers, `L` MoE layers,
`S` batches, `B` batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from flexmoe_jax import client, server
from flexmoe_jax.federation import Federation
from flexmoe_jax.simulation.blocks import over_blocks, over_devices, resolve_block_size, take_rows
from flexmoe_jax.simulation.plan import Floor
from flexmoe_jax.tasks import Batch
from flexmoe_jax.types import Array, Feedback, Own, Server


def probe_all(
    federation: Federation,
    mesh: Mesh,
    begun: Server,
    each: tuple[Own, Array, Array | None],
    arrays: Batch,
) -> Array:
    """(G, n, E) fitness of all experts on batches of many clients.

    Args:
      federation: all its choices.
      mesh: devices that share the clients.
      begun: the server as it is.
      each: of each client, leaves (n, ...), what `probe` takes: what it owns, rows of its batches
        (n, S, B), and the logarithm of its label shares, or None.
      arrays: named examples.
    """
    clients = len(each[1])
    size = resolve_block_size(0, clients, mesh.size)
    room = Floor(clients, 1, clients, size, mesh.size).padded

    def probe_share(each: tuple, known: tuple) -> tuple[None, Array]:
        begun, arrays = known

        def visit(one: tuple[Own, Array, Array | None]) -> tuple[tuple[()], Array]:
            own, rows, log_share = one
            return (), probe(federation, begun, own, arrays, rows, log_share)

        _, fitness = over_blocks(visit, lambda total, _: total, (), each, size)
        return None, fitness

    padded = take_rows(each, jnp.arange(room))
    known = begun, arrays
    _, fitness = over_devices(probe_share, padded, known, mesh, merge=lambda total, _: total)
    return jnp.moveaxis(fitness[:clients], 1, 0)


def probe(
    federation: Federation,
    begun: Server,
    own: Own,
    arrays: Batch,
    rows: Array,
    log_share: Array | None = None,
) -> Array:
    """Fitness of all experts on one client's batches: its score of each, held alone.

    One expert at a time is sent, whatever the client has room for, and nothing is trained. Where
    every group of MoE layers is assigned by itself, all groups hold one expert each, in other
    company from batch to batch. Experts that stay with their clients are tried together.

    Args:
      federation: all its choices.
      begun: the server as it is.
      own: of the client.
      arrays: named examples.
      rows: (S, B) int32 rows of them, -1 for none.
      log_share: (Y,) logarithm of the client's label shares; None for none.

    Returns:
      (G, E) as Q; the initial value where nothing reached an expert.
    """
    desk, site, experts = federation.desk, federation.site, federation.layout.experts
    groups = jnp.arange(desk.groups, dtype=jnp.int32)[:, None]
    numbers = jnp.arange(experts, dtype=jnp.int32)
    tried = numbers[None] if federation.keeps_experts else numbers[:, None]  # (trials, K)

    def try_batch(total: Feedback, batch: tuple[Array, Array]) -> tuple[Feedback, None]:
        turn, rows = batch
        moved = jnp.zeros_like(groups) if federation.keeps_experts else turn * groups
        slots = (tried[:, None, :] + moved) % experts  # (trials, G, K)

        def try_out(slots: Array) -> Feedback:
            down = server.send(desk, begun, slots, jnp.zeros((), jnp.int32))
            return client.appraise(site, own, down, arrays, rows, log_share)

        # What does not depend on the expert is computed once for all trials.
        said = jax.tree.map(desk.by_group, jax.vmap(try_out)(slots))
        return jax.tree.map(lambda t, x: t + desk.of_experts(slots, x), total, said), None

    nothing = jnp.zeros((desk.groups, experts), jnp.float32)
    turns = jnp.arange(len(rows), dtype=jnp.int32)
    said, _ = lax.scan(try_batch, Feedback(nothing, nothing, nothing), (turns, rows))
    return jnp.where(said.usage > 0, server.make_score(desk.fitness)(said), desk.fitness.initial)
