"""Figures that describe a federation: balance and accuracy."""

from __future__ import annotations

import jax
import numpy as np

from flexmoe_jax.types import Evaluation


def coefficient_of_variation(load: np.ndarray) -> float:
    """Standard deviation over mean of (E,) loads; 0 is perfect balance, 0 also if all are zero."""
    load = np.asarray(load, np.float64)
    mean = load.mean()
    return float(load.std() / mean) if mean else 0.0


def accuracies(evaluation: Evaluation) -> dict[str, float | int]:
    """The three accuracies, each a mean over clients that have held an expert, and their number.

    While nobody has held one, the number alone.
    """
    result = jax.device_get(evaluation)
    evaluated = result.evaluated
    if not evaluated.any():
        return {"eval/clients": 0}
    return {
        "eval/global_accuracy": float(result.global_accuracy[evaluated].mean()),
        "eval/personal_accuracy": float(result.personal_accuracy[evaluated].mean()),
        "eval/server_accuracy": float(result.server_accuracy),
        "eval/clients": int(evaluated.sum()),
    }
