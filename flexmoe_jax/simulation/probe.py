"""Probes: each client scores every expert on a few of its batches, whatever its capacity.

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
from flexmoe_jax.server.server import Fetch, take
from flexmoe_jax.simulation.blocks import (
    WHOLE,
    over_blocks,
    over_devices,
    resolve_block_size,
    take_rows,
)
from flexmoe_jax.simulation.exchange import OF_SERVER, fetch_alike
from flexmoe_jax.simulation.plan import Floor
from flexmoe_jax.tasks import Batch
from flexmoe_jax.types import Array, Feedback, Own, Server


def probe_all(
    federation: Federation,
    mesh: Mesh,
    begun: Server,
    each: tuple[Own, Array, Array | None],
    arrays: Batch,
    shortlist: int = 0,
) -> Array:
    """Computes the fitness (G, n, E) of all experts on batches of many clients.

    Args:
      federation: the configuration of the federation.
      mesh: devices that share the clients.
      begun: the current state of the server.
      each: the arguments of `probe` for each client, leaves (n, ...): what it owns, rows of its
        batches (n, S, B), and the logarithm of its label shares, or None.
      arrays: named examples.
      shortlist: how many experts each client downloads to score them: those to which the routers
        give most of its examples. The others are rated below all of these. 0 for all experts.
    """
    clients = len(each[1])
    size = resolve_block_size(0, clients, mesh.size)
    room = Floor(clients, 1, clients, size, mesh.size).padded
    fetch = fetch_alike(mesh)  # All clients try the same experts at the same time.

    def probe_share(each: tuple, known: tuple) -> tuple[None, Array]:
        begun, arrays = known

        def visit(one: tuple[Own, Array, Array | None]) -> tuple[tuple[()], Array]:
            own, rows, log_share = one
            fitness = probe(federation, begun, own, arrays, rows, log_share, fetch)
            if shortlist:
                most = lax.top_k(_routed(federation, begun, own, arrays, rows, fetch), shortlist)[1]
                asked = jax.nn.one_hot(most, fitness.shape[1], dtype=bool).any(axis=1)  # (G, E)
                fitness = jnp.where(asked, fitness, fitness.min() - 1)
            return (), fitness

        _, fitness = over_blocks(visit, lambda total, _: total, (), each, size)
        return None, fitness

    padded = take_rows(each, jnp.arange(room))
    known = begun, arrays
    of_known = OF_SERVER, WHOLE
    _, fitness = over_devices(probe_share, padded, known, mesh, of_whole=of_known)
    return jnp.moveaxis(fitness[:clients], 1, 0)


def probe(
    federation: Federation,
    begun: Server,
    own: Own,
    arrays: Batch,
    rows: Array,
    log_share: Array | None = None,
    fetch: Fetch = take,
) -> Array:
    """Scores every expert on one client's batches, each as the only expert that the client holds.

    The server sends one expert at a time, whatever the client's capacity, and nothing is trained.
    If every group of MoE layers is assigned by itself, each group holds one expert, and the
    combination of experts changes from batch to batch. Experts that stay with their clients are
    tried together.

    Args:
      federation: the configuration of the federation.
      begun: the current state of the server.
      own: what the client owns.
      arrays: named examples.
      rows: (S, B) int32 rows of the examples, -1 for none.
      log_share: (Y,) logarithm of the client's label shares; None for none.
      fetch: takes experts from the server's.

    Returns:
      (G, E) fitness, on the scale of Q; the initial value if no example reached an expert, or the
      score is not finite.
    """
    desk, site, experts = federation.desk, federation.site, federation.layout.experts
    groups = jnp.arange(desk.groups, dtype=jnp.int32)[:, None]
    numbers = jnp.arange(experts, dtype=jnp.int32)
    tried = numbers[None] if federation.keeps_experts else numbers[:, None]  # (trials, K)

    def try_batch(total: Feedback, batch: tuple[Array, Array]) -> tuple[Feedback, None]:
        turn, rows = batch
        moved = jnp.zeros_like(groups) if federation.keeps_experts else turn * groups
        slots = (tried[:, None, :] + moved[None]) % experts  # (trials, G, K)

        def try_out(slots: Array) -> Feedback:
            down = server.send(desk, begun, slots, jnp.zeros((), jnp.int32), fetch)
            return client.appraise(site, own, down, arrays, rows, log_share)

        # The parts that do not depend on the expert are computed once for all trials.
        said = jax.tree.map(desk.by_group, jax.vmap(try_out)(slots))
        return jax.tree.map(lambda t, x: t + desk.of_experts(slots, x), total, said), None

    nothing = jnp.zeros((desk.groups, experts), jnp.float32)
    turns = jnp.arange(len(rows), dtype=jnp.int32)
    said, _ = lax.scan(try_batch, Feedback(nothing, nothing, nothing), (turns, rows))
    score = server.make_score(desk.fitness)(said)
    return jnp.where((said.usage > 0) & jnp.isfinite(score), score, desk.fitness.initial)


def _routed(
    federation: Federation, begun: Server, own: Own, arrays: Batch, rows: Array, fetch: Fetch
) -> Array:
    """Computes the part (G, E) of a client's batches that the routers give to each expert.

    Only the first layer of each group, by name, counts. If it is also the first layer in the model,
    no expert influences its inputs, so the client needs no expert to compute this.
    """
    site, groups = federation.site, federation.groups
    none = jnp.full((groups, 1), federation.layout.experts, jnp.int32)
    down = server.send(federation.desk, begun, none, jnp.zeros((), jnp.int32), fetch)
    params, held = client.model_of(site, own, down)
    first = {group: layer for layer, group in reversed(federation.group.items())}

    def add_batch(total: Array, rows: Array) -> tuple[Array, None]:
        batch, valid = client.take_batch(arrays, rows)
        _, routings = federation.apply(params, federation.task.inputs(batch), held)
        parts = []
        for group in range(groups):
            logits = routings[first[group]].router
            assert logits is not None
            part = jax.nn.softmax(logits).reshape(len(rows), -1, logits.shape[-1]).mean(axis=1)
            parts.append(jnp.where(valid[:, None] > 0, part, 0.0).sum(axis=0))
        return total + jnp.stack(parts), None

    nothing = jnp.zeros((groups, federation.layout.experts), jnp.float32)
    total: Array = lax.scan(add_batch, nothing, rows)[0]
    return total
