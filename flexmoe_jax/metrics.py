"""Figures that describe a federation: balance and accuracy."""

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
    """Standard deviation over mean of (E,) loads: 0 is perfect balance, NaN that there is none."""
    load = np.asarray(load, np.float64)
    mean = load.mean() if load.size else 0.0
    return float(load.std() / mean) if mean else float("nan")


def evaluation_figures(evaluation: Evaluation) -> dict[str, float | int]:
    """Accuracies and losses (nats a unit), and over how many clients they are means.

    A client for which a figure does not exist is left out of its mean. A figure over nobody, or
    that the task does not have, is left out, too.

    `personal`: each client on what is its own; `global`: each on the whole test set; `server`: the
    mean of all predictions; `assembled`: all experts in one model.
    `eval/personal_accuracy_p10`: the client at the tenth percentile, so that nobody is left behind.
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
        figures = {
            "eval/global_accuracy": result.global_accuracy[counted].mean(),
            "eval/global_loss": result.global_loss[counted].mean(),
            "eval/server_accuracy": result.server_accuracy,
            "eval/server_loss": result.server_loss,
            "eval/assembled_accuracy": result.assembled_accuracy,
            "eval/assembled_loss": result.assembled_loss,
        }
        found |= {key: float(value) for key, value in figures.items() if not np.isnan(value)}
    return found


def newcomer_figures(evaluation: Evaluation) -> dict[str, float | int]:
    """How clients fare that have not trained, each on what is its own, as `personal` figures are.

    `eval/newcomer_clients` says over how many the means are; those over nobody are left out.
    """
    result: Evaluation = jax.device_get(evaluation)
    counted = {"eval/newcomer_clients": int(_on_their_own(result).sum())}
    return counted | _personal(result, "newcomer")


def tuned_figures(evaluation: Evaluation) -> dict[str, float | int]:
    """`personal` figures of clients that have trained once more, for themselves alone."""
    return _personal(jax.device_get(evaluation), "tuned")


def _personal(result: Evaluation, word: str) -> dict[str, float | int]:
    own, found = _on_their_own(result), {}
    if own.any() and result.personal.hits is not None:
        found[f"eval/{word}_accuracy"] = float(result.personal_accuracy[own].mean())
    if own.any():
        found[f"eval/{word}_loss"] = float(result.personal_loss[own].mean())
    return found


def _on_their_own(result: Evaluation) -> np.ndarray:
    """(C,) bool, clients with a model, and with something of their own to measure it on."""
    return np.asarray(result.evaluated) & (np.asarray(result.personal_weight) > 0)
