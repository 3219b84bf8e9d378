"""Figures that describe a federation: balance and accuracy."""

from __future__ import annotations

import jax
import numpy as np

from flexmoe_jax.types import Evaluation


def coefficient_of_variation(load: np.ndarray) -> float:
    """Standard deviation over mean of (E,) loads: 0 is perfect balance, NaN that there is none."""
    load = np.asarray(load, np.float64)
    mean = load.mean() if load.size else 0.0
    return float(load.std() / mean) if mean else float("nan")


def accuracies(evaluation: Evaluation) -> dict[str, float | int]:
    """The three accuracies, and over how many clients the first two are means.

    A client for which a figure does not exist is left out of its mean. A mean over nobody is left
    out, too.
    """
    result = jax.device_get(evaluation)
    personal = result.personal_accuracy[result.evaluated]
    measured = personal[~np.isnan(personal)]
    found: dict[str, float | int] = {
        "eval/clients": int(result.evaluated.sum()),
        "eval/personal_clients": measured.size,
    }
    if result.evaluated.any():
        found["eval/global_accuracy"] = float(result.global_accuracy[result.evaluated].mean())
        found["eval/server_accuracy"] = result.server_accuracy
    if measured.size:
        found["eval/personal_accuracy"] = float(measured.mean())
    return found
