"""Bytes that travel in a round, counted from the arrays themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from flexmoe_jax.federated.compress import Compressor, make_compressor
from flexmoe_jax.types import PyTree

# Three float32 for every expert held: usage, correct, loss.
_FEEDBACK_BYTES = 3 * 4


class Payload(NamedTuple):
    """Bytes of the parts that travel.

    Attributes:
      shared_down: of ψ.
      expert_down: of one expert.
      shared_up: of ψ's update, compressed.
      expert_up: of one expert's update, compressed, and its feedback.
    """

    shared_down: int
    expert_down: int
    shared_up: int
    expert_up: int


class Traffic(NamedTuple):
    """Bytes of each client of a cohort.

    Attributes:
      down: (P,) int64 ψ and the assigned experts that the client does not have already.
      up: (P,) int64 their updates and the feedback.
      cached: (P,) int64 bytes that were not sent, since the client had them.
    """

    down: np.ndarray
    up: np.ndarray
    cached: np.ndarray


def payload(shared: PyTree, experts: PyTree, compressor: Compressor | None = None) -> Payload:
    """Sizes of what travels.

    Args:
      shared: ψ, or its shapes.
      experts: θ, leaves (E, ...), or its shapes.
      compressor: of updates; None for none.
    """
    compressor = compressor or make_compressor("none")
    expert = jax.eval_shape(lambda stack: jax.tree.map(lambda x: x[0], stack), experts)
    return Payload(
        shared_down=tree_bytes(shared),
        expert_down=tree_bytes(expert),
        shared_up=compressor.bytes(shared),
        expert_up=compressor.bytes(expert) + _FEEDBACK_BYTES,
    )


def traffic(assignment: np.ndarray, payload: Payload, fresh: np.ndarray | None = None) -> Traffic:
    """What travels for an assignment; gates stay with their clients.

    Args:
      assignment: (P, E) bool.
      payload: sizes of the parts.
      fresh: (P, E) bool, experts that a client has as the server has them; None for none.
    """
    held = assignment.sum(axis=1, dtype=np.int64)
    there = np.zeros_like(held) if fresh is None else (assignment & fresh).sum(axis=1)
    return Traffic(
        down=payload.shared_down + (held - there) * payload.expert_down,
        up=payload.shared_up + held * payload.expert_up,
        cached=there * payload.expert_down,
    )


def tree_bytes(tree: PyTree) -> int:
    """Bytes that the leaves of a pytree hold."""
    leaves: list[Any] = jax.tree.leaves(tree)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
