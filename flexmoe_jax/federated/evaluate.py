"""Evaluation of every client's model on the whole test set, in one pass over the images.

The shared features of an image are computed once, not once per client; what differs between clients
(gate, experts held) runs on the features, block by block of clients. Devices share the images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexmoe_jax.federated.execute import AXIS, client_mesh, take_slots
from flexmoe_jax.types import Array, Evaluation, Params, PyTree, State

Features = Callable[[PyTree, Array], Array]
"""(ψ, uint8 images (B, ...)) -> features (B, D)."""
Classify = Callable[[Params, Array, Array], Array]
"""(a client's parameters, features (B, D), held (K,)) -> class logits (B, Y)."""

_SHARED = PartitionSpec(None, AXIS)


class TestSet(NamedTuple):
    """The test set in equal chunks.

    Attributes:
      images: (chunks, B, h, w, channels) uint8.
      labels: (chunks, B) int32; -1 marks padding.
    """

    images: Array
    labels: Array


def chunk_test_set(
    images: np.ndarray, labels: np.ndarray, batch_size: int = 500, mesh: Mesh | None = None
) -> TestSet:
    """Cuts a test set into chunks of about `batch_size`, as even as can be, shared by the mesh."""
    mesh = mesh or client_mesh(1)
    chunks = -(-len(labels) // batch_size)
    size = -(-len(labels) // (chunks * mesh.size)) * mesh.size
    padding = chunks * size - len(labels)
    padded = np.concatenate([images, np.zeros((padding, *images.shape[1:]), images.dtype)])
    marked = np.concatenate([labels, np.full(padding, -1)]).astype(np.int32)
    shared = NamedSharding(mesh, _SHARED)
    return TestSet(
        jax.device_put(padded.reshape(chunks, size, *images.shape[1:]), shared),
        jax.device_put(marked.reshape(chunks, size), shared),
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
      label_share: (C, Y) training label shares of each client; personal accuracy is the mean of
        the per-class accuracies so weighted (over the classes that the test set has).

    Returns:
      The accuracies. Clients that have never held an expert take no part.
    """
    classes = label_share.shape[1]
    experts = state.fitness.shape[1]
    evaluated = state.slots[:, 0] < experts  # slots rise, so an empty first slot means none held

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(_SHARED, PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def evaluate_share(test: TestSet, known: tuple[State, Array]) -> tuple[Array, Array]:
        state, evaluated = known
        blocks = _blocks((state.slots, state.gates, state.private, evaluated))

        def evaluate_chunk(hits: Array, chunk: TestSet) -> tuple[Array, Array]:
            shared_features = features(state.shared, chunk.images)
            one_hot = jax.nn.one_hot(chunk.labels, classes)  # (B, Y), zero rows for padding

            def evaluate_client(
                slots: Array, gate: PyTree, private: PyTree, counts: Array
            ) -> tuple[Array, Array]:
                held = take_slots(state.experts, slots)
                params = Params(state.shared, held, take_slots(gate, slots), private)
                logits = classify(params, shared_features, slots < experts)
                hit = (logits.argmax(axis=-1) == chunk.labels) & counts
                return counts * jax.nn.softmax(logits), hit @ one_hot

            def evaluate_block(total: Array, block: tuple) -> tuple:
                probability, client_hits = jax.vmap(evaluate_client)(*block)
                return total + probability.sum(axis=0), client_hits

            scanned: tuple[Array, Array] = lax.scan(evaluate_block, jnp.zeros_like(one_hot), blocks)
            total, client_hits = scanned  # (B, Y), (blocks, p, Y)
            client_hits = client_hits.reshape(-1, classes)[: evaluated.size]
            return hits + client_hits, (total.argmax(axis=-1) == chunk.labels).sum()

        hits = jnp.zeros((evaluated.size, classes))
        return lax.psum(lax.scan(evaluate_chunk, hits, test), AXIS)

    hits, server_hits = evaluate_share(test, (state, evaluated))
    counts = jax.nn.one_hot(test.labels, classes).sum(axis=(0, 1))  # (Y,)
    share = jnp.where(counts > 0, label_share, 0.0)
    share = share / jnp.maximum(share.sum(axis=1, keepdims=True), 1e-9)
    class_accuracy = jnp.where(counts > 0, hits / jnp.maximum(counts, 1.0), jnp.nan)
    return Evaluation(
        class_accuracy=class_accuracy,
        global_accuracy=hits.sum(axis=1) / counts.sum(),
        personal_accuracy=jnp.nansum(share * class_accuracy, axis=1),
        server_accuracy=server_hits.sum() / counts.sum(),
        evaluated=evaluated,
    )


def _blocks(clients: PyTree) -> PyTree:
    """Leaves (C, ...) as (blocks, p, ...), padded with zeros: p clients run side by side."""
    count = jax.tree.leaves(clients)[0].shape[0]
    together = 1 if jax.default_backend() == "cpu" else min(64, count)

    def cut(leaf: Array) -> Array:
        padding = [(0, -count % together)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, padding).reshape(-1, together, *leaf.shape[1:])

    return jax.tree.map(cut, clients)
