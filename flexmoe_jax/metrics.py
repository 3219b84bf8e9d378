"""Metrics of a federation: load balance and accuracy."""

from __future__ import annotations

import jax
import numpy as np

from flexmoe_jax.types import Evaluation

__all__ = [
    "coefficient_of_variation",
    "evaluation_figures",
    "newcomer_figures",
    "tuned_figures",
]


def coefficient_of_variation(load: np.ndarray) -> float:
    """Standard deviation over mean of (E,) loads: 0 is perfect balance; NaN if the mean is 0."""
    load = np.asarray(load, np.float64)
    mean = load.mean() if load.size else 0.0
    return float(load.std() / mean) if mean else float("nan")


def evaluation_figures(evaluation: Evaluation) -> dict[str, float | int]:
    """Computes accuracies and losses (nats per unit), and the number of clients in each mean.

    A mean leaves out the clients for which it is undefined. A figure that no client has, or that
    the task does not define, is left out of the result.

    `personal`: each client on its own data; `global`: each client on the whole test set; `server`:
    the mean of the clients' predictions; `assembled`: one model with all experts.
    `eval/personal_accuracy_p10`: the tenth percentile over clients; it shows clients left behind.
    """
    result: Evaluation = jax.device_get(evaluation)
    counted, own = np.asarray(result.evaluated), _on_their_own(result)
    found: dict[str, float | int] = {
        "eval/clients": int(counted.sum()),
        "eval/personal_clients": int(own.sum()),
    }
    found |= _personal(result, "personal")
    if "eval/personal_accuracy" in found:
        tenth = np.percentile(result.personal_accuracy[own], 10)
        found["eval/personal_accuracy_p10"] = float(tenth)
    if counted.any():
        everywhere = result.global_accuracy[counted], result.global_loss[counted]
        found |= _defined("global", *(values.mean() for values in everywhere))
        found |= _defined("server", result.server_accuracy, result.server_loss)
        found |= _defined("assembled", result.assembled_accuracy, result.assembled_loss)
    return found


def newcomer_figures(evaluation: Evaluation) -> dict[str, float | int]:
    """Computes the `personal` figures of clients that have not trained, each on its own data.

    `eval/newcomer_clients` is the number of clients in the means. If it is 0, the means are left
    out.
    """
    result: Evaluation = jax.device_get(evaluation)
    counted = {"eval/newcomer_clients": int(_on_their_own(result).sum())}
    return counted | _personal(result, "newcomer")


def tuned_figures(evaluation: Evaluation) -> dict[str, float | int]:
    """Computes the `personal` figures of clients that have trained once more for themselves."""
    return _personal(jax.device_get(evaluation), "tuned")


def _personal(result: Evaluation, word: str) -> dict[str, float]:
    own = _on_their_own(result)
    if not own.any():
        return {}
    return _defined(word, result.personal_accuracy[own].mean(), result.personal_loss[own].mean())


def _defined(word: str, accuracy: float, loss: float) -> dict[str, float]:
    """Names accuracy and loss; a figure that the task does not define is NaN, and left out."""
    figures = {f"eval/{word}_accuracy": accuracy, f"eval/{word}_loss": loss}
    return {key: float(value) for key, value in figures.items() if not np.isnan(value)}


def _on_their_own(result: Evaluation) -> np.ndarray:
    """(C,) bool, clients that have a model and test data of their own."""
    return np.asarray(result.evaluated) & (np.asarray(result.personal_weight) > 0)
