"""Figures that describe a federation: balance, accuracy, bytes."""

from __future__ import annotations

import jax
import numpy as np

from flexmoe_jax.types import Evaluation, PyTree, State


def coefficient_of_variation(load: np.ndarray) -> float:
    """Standard deviation over mean of (E,) loads; 0 is perfect balance, 0 also if all are zero."""
    load = np.asarray(load, np.float64)
    mean = load.mean()
    return float(load.std() / mean) if mean else 0.0


def accuracies(evaluation: Evaluation) -> dict[str, float | int]:
    """The three accuracies, each a mean over clients that have held an expert, and their number."""
    result = jax.device_get(evaluation)
    evaluated = result.evaluated
    return {
        "eval/global_accuracy": float(result.global_accuracy[evaluated].mean()),
        "eval/personal_accuracy": float(result.personal_accuracy[evaluated].mean()),
        "eval/server_accuracy": float(result.server_accuracy),
        "eval/clients": int(evaluated.sum()),
    }


def tree_bytes(tree: PyTree) -> int:
    """Bytes that the leaves of a pytree hold."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def round_bytes(state: State, assignment: np.ndarray) -> dict[str, int]:
    """Bytes that travel in a round, all clients together.

    Down: ψ and the assigned experts. Up: their updates, and three float32 of feedback per expert.
    Gates stay with their clients.

    Args:
      state: of the federation; only its shapes matter.
      assignment: (P, E) bool.
    """
    clients, experts = assignment.shape
    held = int(assignment.sum())
    payload = clients * tree_bytes(state.shared) + held * (tree_bytes(state.experts) // experts)
    return {"comm/bytes_down": payload, "comm/bytes_up": payload + held * 3 * 4}
