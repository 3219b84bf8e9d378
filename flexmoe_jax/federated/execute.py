"""Runs a cohort: devices share its blocks of clients, and a block's clients run side by side.

A device takes its blocks one after the other and keeps a running sum; the sums of all devices are
added at the end. How many devices there are and how many clients run side by side decides speed
alone. On a CPU one client at a time keeps its activations in cache; on an accelerator the mapped
client axis is what fills the chip.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flexmoe_jax.data import ClientData
from flexmoe_jax.errors import InputError
from flexmoe_jax.federated.aggregate import Sums, Updates, add_updates, init_sums
from flexmoe_jax.federated.client import (
    Batches,
    Client,
    ClientState,
    ClientUpdate,
    LocalTraining,
    draw_batches,
)
from flexmoe_jax.federated.uplink import Tampering, Uplink, deliver
from flexmoe_jax.types import Array, Feedback, Key, Params, Plan, PyTree

AXIS = "clients"
"""The mesh axis over which devices share a cohort."""
_ALONG_FIRST = PartitionSpec(AXIS)

# Folded into a client's key of a round, for the noise with which it tampers; 0 is for augmentation.
_NOISE = 1


class CohortResult(NamedTuple):
    """What a cohort's training yields.

    Attributes:
      sums: the updates, summed by weight; None where they were collected.
      updates: the updates side by side; None where they were summed.
      gates: (P, K, ...) each client's new gate, cut to its slots.
      private: (P, ...) what else each client keeps to itself.
      feedback: (P, K).
      loss: (P,) mean training cross-entropy of each client, in nats.
      examples: (P,) examples trained on.
      residual: (P, ...) what compression has kept back.
      quarantined: (P,) bool, whose update was refused.
      norms: (P, 2) lengths of the updates' parts, refused ones included (see `quarantine`); 0 for
        none.
    """

    sums: Sums | None
    updates: Updates | None
    gates: PyTree
    private: PyTree
    feedback: Feedback
    loss: Array
    examples: Array
    residual: PyTree
    quarantined: Array
    norms: Array

    def without(self, refused: Array) -> CohortResult:
        """The result without what some clients (P,) did; from sums only all can be taken.

        Gates, private parameters and residuals are left to whoever keeps them.
        """

        def drop(tree: PyTree) -> PyTree:
            return _where(refused, jax.tree.map(jnp.zeros_like, tree), tree)

        sums, updates, feedback = self.sums, self.updates, self.feedback
        if sums is not None:
            weights = sums.shared_weight, sums.expert_weight
            of_shared, of_experts = jax.tree.map(lambda w: jnp.where(refused.all(), 0, w), weights)
            sums = sums._replace(shared_weight=of_shared, expert_weight=of_experts)
        if updates is not None:
            examples, usage = drop((updates.examples, updates.usage))
            updates = updates._replace(examples=examples, usage=usage)
        return self._replace(
            sums=sums,
            updates=updates,
            feedback=drop(feedback),
            loss=drop(self.loss),
            examples=drop(self.examples),
            quarantined=self.quarantined | (refused & (self.examples > 0)),
        )


def client_mesh(devices: int = 0) -> Mesh:
    """A mesh of this many devices, over all processes; 0 for all there are.

    Raises:
      InputError: there are fewer.
    """
    there = jax.device_count()
    if not 0 <= devices <= there:
        raise InputError("execution.devices", devices, f"give 0 (all) to {there}")
    chosen = jax.devices()[: devices or there]
    return jax.make_mesh((len(chosen),), (AXIS,), (AxisType.Auto,), devices=chosen)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts a whole copy of every array on each device of the mesh.

    Of several processes each hands over its own copy, which must be equal to the others'. It is not
    checked: that would send all copies around, and refuse NaN, which differs from itself.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)

    def put(leaf: np.ndarray) -> Array:
        return jax.make_array_from_callback(leaf.shape, everywhere, lambda part: leaf[part])

    return jax.tree.map(lambda leaf: put(np.asarray(leaf)), jax.device_get(tree))


def over_devices(
    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    split: PyTree,
    whole: PyTree,
    mesh: Mesh,
    spec: PartitionSpec = _ALONG_FIRST,
) -> tuple[PyTree, PyTree]:
    """Runs a function of (a share of `split`, all of `whole`) on every device of a mesh.

    Args:
      function: its first output is added up over the devices, its second is joined along the first
        axis.
      split: arrays that the devices share out, along the axis that `spec` gives to `AXIS`.
      whole: arrays that each device gets as they are.
      mesh: from `client_mesh`. One device alone runs the plain function, which JAX can then also
        run without compiling it.
      spec: of `split`.
    """
    if mesh.size == 1:
        return function(split, whole)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spec, PartitionSpec()),
        out_specs=(PartitionSpec(), _ALONG_FIRST),
        check_vma=False,
    )
    def on_one(split: PyTree, whole: PyTree) -> tuple[PyTree, PyTree]:
        total, joined = function(split, whole)
        return lax.psum(total, AXIS), joined

    outputs: tuple[PyTree, PyTree] = on_one(split, whole)
    return outputs


def resolve_block_size(block_size: int, cohort: int, devices: int = 1) -> int:
    """Turns 0 (automatic) into a number, and cuts it to a device's share of the cohort.

    Automatic is 1 on CPU and the device's whole share, up to 64 clients, elsewhere.
    """
    automatic = 1 if jax.default_backend() == "cpu" else 64
    return min(block_size or automatic, -(-cohort // devices))


def train_cohort(
    make_client: Callable[[ClientData, Array], Client],
    local: LocalTraining,
    data: ClientData,
    shared: PyTree,
    experts: PyTree,
    gates: PyTree,
    private: PyTree,
    plan: Plan,
    round_index: Array,
    key: Key,
    block_size: int,
    mesh: Mesh,
    uplink: Uplink | None = None,
    residual: PyTree = (),
    limits: Array | None = None,
    collect: bool = False,
) -> CohortResult:
    """Trains every client of the plan, and sums their updates by weight while it goes.

    Args:
      make_client: builds the local training of a client that draws from the data in a round.
      local: its settings.
      data: all clients' examples.
      shared: ψ.
      experts: θ, leaves (E, ...).
      gates: φ, leaves (C, E, ...).
      private: what else clients keep to themselves, leaves (C, ...).
      plan: cohort and slots, P a multiple of `block_size` times the number of devices.
      round_index: () rounds completed.
      key: the round's key; each client folds its own id into it.
      block_size: clients side by side on a device.
      mesh: devices that share the cohort, along its axis `AXIS`.
      uplink: how updates reach the server; None for `Uplink()`.
      residual: of all clients' compression, leaves (C, ...) and (C, K, ...); () for none.
      limits: (2,) greatest lengths of an update's parts (see `quarantine`); None for none.
      collect: hands the updates back side by side instead, which takes memory for P of them.

    Returns:
      The result; padding has zero examples and zero usage.
    """
    uplink = uplink or Uplink()
    experts_total = plan.load.shape[0]

    def train_share(share: tuple, known: tuple) -> tuple[Sums | None, tuple]:
        data, shared, experts, gates, private, residual, round_index, key, limits = known
        client = make_client(data, round_index)

        def train(start: Params, batches: Batches, held: Array, steps: Array) -> ClientUpdate:
            # A client alone in its block is taken out of it for the whole of its training: with the
            # axis of one, XLA copies all parameters at every step.
            alone = block_size == 1
            across = _as_is if alone else jax.vmap
            if alone:
                start, batches, held = jax.tree.map(lambda x: x[0], (start, batches, held))

            def step(t: Array, state: ClientState) -> ClientState:
                batch = jax.tree.map(lambda x: x[..., t, :], batches)
                stepped = across(client.step)(state, batch, held)
                # Nor does it ever go on beyond its own steps.
                return stepped if alone else _where(t < steps, stepped, state)

            state = lax.fori_loop(0, steps.max(), step, across(client.init)(start))
            update = across(client.final)(start, state)
            return jax.tree.map(lambda x: x[None], update) if alone else update

        def train_block(sums: Sums | None, block: tuple[PyTree, ...]) -> tuple[Sums | None, tuple]:
            # (p,), (p, K), (p,), leaves (p,), leaves (p, T, B)
            clients, slots, steps, tampering, batches = block
            held = slots < experts_total
            start = Params(
                shared=jax.tree.map(
                    lambda x: jnp.broadcast_to(x, (*clients.shape, *x.shape)), shared
                ),
                experts=take_slots(experts, slots),
                gate=jax.tree.map(lambda g: _take_pairs(g, clients, slots), gates),
                private=take_slots(private, clients),
            )
            update = train(start, batches, held, steps)
            kept = take_slots(residual, clients)
            reach = jnp.sqrt(jnp.maximum(steps, 1).astype(jnp.float32))[:, None]
            update, kept, refused, norms = jax.vmap(partial(deliver, uplink))(
                update, held, start, kept, tampering, limits * reach
            )
            weights = update.examples, update.feedback.usage
            if uplink.noise_multiplier:
                weights = jax.tree.map(jnp.ones_like, weights)
            sent = update.shared, update.experts, slots, *weights
            if sums is not None:
                sums = add_updates(sums, *sent)
            of_clients = update.gate, update.private, update.feedback, update.loss, update.examples
            judged = kept, refused, norms / reach
            return sums, (None if sums is not None else Updates(*sent), *of_clients, *judged)

        clients, slots, most, tampering = share
        index = jnp.take(data.index, clients, axis=0, mode="clip")
        size = jnp.where(
            clients < data.size.shape[0], jnp.take(data.size, clients, axis=0, mode="clip"), 0
        )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, clients)
        batches = jax.vmap(partial(draw_batches, local))(keys, index, size)
        if tampering.noise is not None:
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, _NOISE)
            tampering = tampering._replace(key=own)
        rows = clients, slots, jnp.minimum(local.steps(size), most), tampering, batches
        blocks = jax.tree.map(lambda x: x.reshape(-1, block_size, *x.shape[1:]), rows)
        start = init_sums(shared, experts, experts_total) if not collect else None
        sums, outputs = lax.scan(train_block, start, blocks)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
        return sums, flat

    if limits is None:
        limits = jnp.full(2, jnp.inf, jnp.float32)
    known = data, shared, experts, gates, private, residual, round_index, key, limits
    rows = plan.clients, plan.slots, plan.steps, Tampering(plan.tamper, plan.noise)
    sums, outputs = over_devices(train_share, rows, known, mesh)
    updates, *others = outputs
    return CohortResult(sums, updates, *others)


def _as_is(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    return function


def _where(active: Array, new: PyTree, old: PyTree) -> PyTree:
    """The new leaves (p, ...) of clients that are active (p,), the old ones of the others."""
    return jax.tree.map(
        lambda n, o: jnp.where(active.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old
    )


def take_slots(stack: PyTree, slots: Array) -> PyTree:
    """Gathers rows (..., K) of leaves (E, ...); a number out of range takes any row."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, slots, axis=0, mode="clip"), stack)


def _take_pairs(leaf: Array, clients: Array, slots: Array) -> Array:
    return leaf.at[clients[:, None], slots].get(mode="clip")
