"""Evaluation of every client's model on the whole test set, in one pass over the images.

The shared features of an image are computed once, not once per client; what differs between clients
(gate, experts held) runs on the features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flexmoe_jax.federated.execute import take_slots
from flexmoe_jax.types import Array, Evaluation, Params, PyTree, State

Features = Callable[[PyTree, Array], Array]
"""(ψ, uint8 images (B, ...)) -> features (B, D)."""
Classify = Callable[[Params, Array, Array], Array]
"""(a client's parameters, features (B, D), held (K,)) -> class logits (B, Y)."""


class TestSet(NamedTuple):
    """The test set in equal chunks.

    Attributes:
      images: (chunks, B, h, w, channels) uint8.
      labels: (chunks, B) int32; -1 marks padding.
    """

    images: Array
    labels: Array


def chunk_test_set(images: np.ndarray, labels: np.ndarray, batch_size: int = 500) -> TestSet:
    """Cuts a test set into chunks of at most `batch_size`, as even as can be."""
    chunks = -(-len(labels) // batch_size)
    size = -(-len(labels) // chunks)
    padding = chunks * size - len(labels)
    padded = np.concatenate([images, np.zeros((padding, *images.shape[1:]), images.dtype)])
    marked = np.concatenate([labels, np.full(padding, -1)]).astype(np.int32)
    return TestSet(
        jnp.asarray(padded.reshape(chunks, size, *images.shape[1:])),
        jnp.asarray(marked.reshape(chunks, size)),
    )


def evaluate(
    features: Features, classify: Classify, state: State, test: TestSet, label_share: Array
) -> Evaluation:
    """Evaluates all clients with the aggregated ψ and θ, their own gates and latest experts.

    Args:
      features: the shared part of the model.
      classify: the rest, for one client.
      state: of the federation.
      test: the test set.
      label_share: (C, Y) training label shares of each client; personal accuracy is the mean of
        the per-class accuracies so weighted (over the classes that the test set has).

    Returns:
      The accuracies. Clients that have never held an expert take no part.
    """
    experts = jax.tree.leaves(state.experts)[0].shape[0]
    classes = label_share.shape[1]
    evaluated = state.slots[:, 0] < experts  # slots rise, so an empty first slot means none held

    def evaluate_chunk(hits: Array, chunk: TestSet) -> tuple[Array, Array]:
        shared_features = features(state.shared, chunk.images)
        one_hot = jax.nn.one_hot(chunk.labels, classes)  # (B, Y), zero rows for padding

        def evaluate_client(total: Array, client: tuple[Array, PyTree, Array]) -> tuple:
            slots, gate, counts = client
            params = Params(state.shared, take_slots(state.experts, slots), take_slots(gate, slots))
            logits = classify(params, shared_features, slots < experts)
            hit = (logits.argmax(axis=-1) == chunk.labels) & counts
            return total + counts * jax.nn.softmax(logits), hit @ one_hot

        scanned: tuple[Array, Array] = lax.scan(
            evaluate_client, jnp.zeros_like(one_hot), (state.slots, state.gates, evaluated)
        )
        total, client_hits = scanned  # (B, Y), (C, Y)
        return hits + client_hits, (total.argmax(axis=-1) == chunk.labels).sum()

    hits, server_hits = lax.scan(evaluate_chunk, jnp.zeros(label_share.shape), test)
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
