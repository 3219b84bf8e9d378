"""Counts the bytes transferred in a round, from the arrays themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from flexmoe_jax.client import Codec
from flexmoe_jax.federation import Federation
from flexmoe_jax.types import PyTree

# Three float32 for every expert held in a layer: usage, correct, loss.
_FEEDBACK_BYTES = 3 * 4


class Payload(NamedTuple):
    """Sizes in bytes of the parts that are transferred.

    Attributes:
      shared_down: of ψ.
      expert_down: of one expert.
      shared_up: of ψ's update, compressed.
      expert_up: of one expert's update, compressed, plus its feedback.
    """

    shared_down: int
    expert_down: int
    shared_up: int
    expert_up: int


class Traffic(NamedTuple):
    """Bytes that each client of a cohort transfers.

    Attributes:
      down: (P,) int64 for ψ and the assigned experts that the client does not have already.
      up: (P,) int64 for the updates of ψ and of all assigned experts, and the feedback.
      cached: (P,) int64 bytes of assigned experts that are not sent because the client has them.
    """

    down: np.ndarray
    up: np.ndarray
    cached: np.ndarray


def payload(shared: PyTree, experts: PyTree, codec: Codec | None = None) -> Payload:
    """Computes the sizes of the parts that are transferred.

    Args:
      shared: ψ, or its shapes.
      experts: θ by MoE layer, leaves (E, ...), or its shapes: all layers that an expert spans, or
        a single layer if each layer is assigned by itself.
      codec: how updates are encoded; None for no compression.
    """
    codec = codec or Codec()
    expert = jax.eval_shape(lambda stack: jax.tree.map(lambda x: x[0], stack), experts)
    return Payload(
        shared_down=tree_bytes(shared),
        expert_down=tree_bytes(expert),
        shared_up=codec.compressor.bytes(shared),
        expert_up=codec.compressor.bytes(expert) + len(experts) * _FEEDBACK_BYTES,
    )


def payloads(federation: Federation) -> tuple[Payload, ...]:
    """Computes the sizes of the transferred parts in a federation, for each group of MoE layers."""
    parts = federation.layout.split(nn.meta.unbox(federation.shapes))
    groups: list[dict[str, PyTree]] = [{} for _ in range(federation.groups)]
    for layer, group in federation.group.items():
        # Clients send feedback even on experts that stay with them.
        groups[group][layer] = parts.experts.get(layer, {})
    return tuple(payload(parts.shared, experts, federation.codec) for experts in groups)


def traffic(
    assignment: np.ndarray, payload: Payload | Sequence[Payload], current: np.ndarray | None = None
) -> Traffic:
    """Computes the bytes transferred for an assignment; private gates are not transferred.

    Args:
      assignment: (P, E) bool, or (P, G, E) for groups of MoE layers.
      payload: sizes of the parts, one for each group; ψ is counted once, with the first.
      current: same shape as the assignment: experts of which the client has the server's current
        version; None for none.
    """
    sizes = [payload] if isinstance(payload, Payload) else list(payload)
    given = assignment if assignment.ndim == 3 else assignment[:, None]
    known = np.zeros_like(given) if current is None else current.reshape(given.shape)
    held, there = given.sum(axis=2, dtype=np.int64), (given & known).sum(axis=2, dtype=np.int64)
    down, up = (
        np.array([getattr(size, f"expert_{way}") for size in sizes]) for way in ("down", "up")
    )
    return Traffic(
        down=sizes[0].shared_down + (held - there) @ down,
        up=sizes[0].shared_up + held @ up,
        cached=there @ down,
    )


def probe_traffic(federation: Federation, clients: int) -> Traffic:
    """Computes the bytes for probing `clients` clients: ψ and all experts down, feedback up.

    Afterwards the clients already have every expert that they may be assigned.
    """
    sizes, experts = payloads(federation), federation.layout.experts
    everything = np.ones((clients, federation.groups, experts), bool)
    feedback = experts * len(federation.layout.layers) * _FEEDBACK_BYTES
    return traffic(everything, sizes)._replace(up=np.full(clients, feedback, np.int64))


def tree_bytes(tree: PyTree) -> int:
    """Returns the size in bytes of all leaves of a pytree."""
    leaves: list[Any] = jax.tree.leaves(tree)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
