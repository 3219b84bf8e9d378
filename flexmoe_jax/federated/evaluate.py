"""Evaluation of every client's model on the whole test set, in one pass over the images.

The shared features of an image are computed once, not once per client; what differs between clients
(gate, experts held) runs on the features, block by block of clients. Devices share the images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexmoe_jax.federated.execute import AXIS, client_mesh, over_devices, take_slots
from flexmoe_jax.types import Array, Evaluation, Params, PyTree, State

Features = Callable[[PyTree, Array], Array]
"""(ψ, uint8 images (B, ...)) -> features (B, D)."""
Classify = Callable[[Params, Array, Array], Array]
"""(a client's parameters, features (B, D), held (K,)) -> class logits (B, Y)."""

Hits = tuple[Array, Array | None]
"""Examples that clients get right: by class (C, Y), and of their own (C,) where they have such."""

_SHARED = PartitionSpec(None, AXIS)


class TestSet(NamedTuple):
    """The test set in equal chunks.

    Attributes:
      images: (chunks, B, h, w, channels) uint8.
      labels: (chunks, B) int32; -1 marks padding.
      owner: (chunks, B) int32, the client that each example is one of; -1 for nobody. None where
        clients have no test examples of their own.
    """

    images: Array
    labels: Array
    owner: Array | None = None


def chunk_test_set(
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int = 500,
    mesh: Mesh | None = None,
    owner: np.ndarray | None = None,
) -> TestSet:
    """Cuts a test set into chunks of about `batch_size`, as even as can be, shared by the mesh.

    Args:
      images: (M, ...) as the training images.
      labels: (M,) int.
      batch_size: B, about.
      mesh: from `client_mesh`; None for one device.
      owner: (M,) int, the client that each example is one of, -1 for nobody; None where clients
        have no test examples of their own.
    """
    mesh = mesh or client_mesh(1)
    chunks = -(-len(labels) // batch_size)
    size = -(-len(labels) // (chunks * mesh.size)) * mesh.size
    padding = chunks * size - len(labels)
    shared = NamedSharding(mesh, _SHARED)

    def cut(values: np.ndarray, filler: int) -> Array:
        ends = np.full((padding, *values.shape[1:]), filler, values.dtype)
        padded = np.concatenate([values, ends])
        return jax.device_put(padded.reshape(chunks, size, *values.shape[1:]), shared)

    return TestSet(
        cut(images, 0),
        cut(np.asarray(labels, np.int32), -1),
        None if owner is None else cut(np.asarray(owner, np.int32), -1),
    )


def evaluate(
    features: Features,
    classify: Classify,
    mesh: Mesh,
    state: State,
    test: TestSet,
    label_share: Array,
) -> Evaluation:
    """Evaluates all clients with the aggregated ψ and θ, their own gates and latest experts.

    Args:
      features: the shared part of the model.
      classify: the rest, for one client.
      mesh: devices that share the images, along its axis `AXIS`.
      state: of the federation.
      test: the test set.
      label_share: (C, Y) training label shares of each client. Where clients have no test examples
        of their own, personal accuracy is the mean of the per-class accuracies so weighted, over
        the classes that the test set has.

    Returns:
      What the models get right. Clients that have never held an expert take no part.
    """
    experts = state.fitness.shape[1]
    evaluated = state.slots[:, 0] < experts  # slots rise, so an empty first slot means none held

    def of_device(test: TestSet, known: tuple[State, Array]) -> tuple[tuple[Hits, Array], None]:
        return _count_hits(features, classify, label_share.shape[1], test, *known), None

    found, _ = over_devices(of_device, test, (state, evaluated), mesh, _SHARED)
    (hits, own), server_hits = found
    examples = _one_hot(test.labels, label_share.shape[1]).sum(axis=(0, 1))
    if test.owner is None:
        share = jnp.where(examples > 0, label_share, 0.0)
        own = (share * hits / jnp.maximum(examples, 1.0)).sum(axis=1)
        weight = share.sum(axis=1)
    else:
        # A number out of range is dropped; a negative one would count from the end.
        owner = jnp.where(test.owner >= 0, test.owner, evaluated.size).ravel()
        weight = jnp.zeros(evaluated.size, jnp.float32).at[owner].add(1.0, mode="drop")
    return Evaluation(hits, examples, own, weight, server_hits, evaluated)


def _count_hits(
    features: Features,
    classify: Classify,
    classes: int,
    test: TestSet,
    state: State,
    evaluated: Array,
) -> tuple[Hits, Array]:
    """What each client, and all clients together, get right of one device's share of the images."""
    numbers = jnp.arange(evaluated.size, dtype=jnp.int32)
    blocks = _blocks((numbers, state.slots, state.gates, state.private, evaluated))

    def count_chunk(so_far: Hits, chunk: TestSet) -> tuple[Hits, Array]:
        shared_features = features(state.shared, chunk.images)
        one_hot = _one_hot(chunk.labels, classes)

        def count_client(
            number: Array, slots: Array, gate: PyTree, private: PyTree, counts: Array
        ) -> tuple[Array, Hits]:
            held = take_slots(state.experts, slots)
            params = Params(state.shared, held, take_slots(gate, slots), private)
            logits = classify(params, shared_features, slots < state.fitness.shape[1])
            hit = ((logits.argmax(axis=-1) == chunk.labels) & counts).astype(jnp.float32)
            own = None if chunk.owner is None else jnp.where(chunk.owner == number, hit, 0.0).sum()
            return counts * jax.nn.softmax(logits), (hit @ one_hot, own)

        def count_block(total: Array, block: tuple) -> tuple[Array, Hits]:
            probability, hits = jax.vmap(count_client)(*block)
            return total + probability.sum(axis=0), hits

        total, found = lax.scan(count_block, jnp.zeros_like(one_hot), blocks)
        of_clients = jax.tree.map(lambda h: h.reshape(-1, *h.shape[2:])[: evaluated.size], found)
        server_hits = (total.argmax(axis=-1) == chunk.labels).sum(dtype=jnp.int32)
        return jax.tree.map(jnp.add, so_far, of_clients), server_hits

    none = jnp.zeros((evaluated.size, classes), jnp.float32)
    hits, server_hits = lax.scan(
        count_chunk, (none, None if test.owner is None else none[:, 0]), test
    )
    return hits, server_hits.sum(dtype=jnp.int32)


def _one_hot(labels: Array, classes: int) -> Array:
    """(..., Y) float32; zeros for padding."""
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32)


def _blocks(clients: PyTree) -> PyTree:
    """Leaves (C, ...) as (blocks, p, ...), padded with zeros: p clients run side by side."""
    count = jax.tree.leaves(clients)[0].shape[0]
    together = 1 if jax.default_backend() == "cpu" else min(64, count)

    def cut(leaf: Array) -> Array:
        padding = [(0, -count % together)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, padding).reshape(-1, together, *leaf.shape[1:])

    return jax.tree.map(cut, clients)
