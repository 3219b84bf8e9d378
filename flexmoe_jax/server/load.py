"""Load models: the load that a client puts on each expert it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from flexmoe_jax.errors import InputError
from flexmoe_jax.options.assignment import LOAD_MODELS
from flexmoe_jax.types import Array


class LoadModel(NamedTuple):
    """A load model: predicts the load for the assignment, and measures it after the round.

    Attributes:
      weigh: (cohort (P,), usage (P, E) and rounds held (P, E) so far) -> load weight w of a holder
        on its expert: a scalar, (P,) or (P, E). Runs on the host.
      measure: (slots (P, K), examples trained on (P,), usage (P, K)) -> load (P, K) that each pair
        really delivered. Deficits are computed from it. A client whose update never arrived, or was
        refused, delivered none. Runs inside the round's jit.
      equal: whether every pair has weight 1.
    """

    weigh: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray | float]
    measure: Callable[[Array, Array, Array], Array]
    equal: bool = False


def make_load_model(
    name: str, examples: Num[np.ndarray, " C"], capacity: Num[np.ndarray, " C"], top_k: int = 1
) -> LoadModel:
    """Builds a load model by name.

    `clients`: the weight of a holder is 1. `samples`: the weight is the number of examples that the
    holder trains on in a round. `usage`: the weight is the predicted number of units that the
    holder routes to the expert: the mean over the rounds in which it held the expert, or an even
    split before the first, with as many units per example as the cohort has had so far. Gates may
    route differently, so with `usage` the delivered load is the measured usage, not the assigned
    load: an expert that its holders neglect is owed the difference.

    Args:
      name: one of `LOAD_MODELS`.
      examples: (C,) examples that each client trains on in a round, counted once per step.
      capacity: (C,) k_c.
      top_k: experts per example; a client that holds fewer experts uses all of them.

    Returns:
      The load model.

    Raises:
      InputError: the name is not in `LOAD_MODELS`.
    """
    if len(examples) != len(capacity):
        remedy = f"give one for each of the {len(capacity)} clients"
        raise InputError("examples", f"{len(examples)} numbers", remedy)

    def clients(cohort: np.ndarray, seen: np.ndarray, rounds: np.ndarray) -> float:
        return 1.0

    def samples(cohort: np.ndarray, seen: np.ndarray, rounds: np.ndarray) -> np.ndarray:
        return examples[cohort].astype(np.float64)

    def usage(cohort: np.ndarray, seen: np.ndarray, rounds: np.ndarray) -> np.ndarray:
        each = np.minimum(top_k, capacity) / np.maximum(capacity, 1)
        even = (examples * each)[cohort, None]
        expected = (even * rounds).sum()
        units = seen.sum() / expected if expected else 1.0
        return np.where(rounds > 0, seen / np.maximum(rounds, 1), units * even)

    def holders(slots: Array, examples: Array, usage: Array) -> Array:
        return jnp.broadcast_to(examples[:, None] > 0, slots.shape).astype(usage.dtype)

    def trained_on(slots: Array, examples: Array, usage: Array) -> Array:
        return jnp.broadcast_to(examples[:, None], slots.shape)

    def routed(slots: Array, examples: Array, usage: Array) -> Array:
        return usage

    models = {
        "clients": LoadModel(clients, holders, equal=True),
        "samples": LoadModel(samples, trained_on),
        "usage": LoadModel(usage, routed),
    }
    if name not in models:
        raise InputError("assignment.load", name, f"choose one of {', '.join(LOAD_MODELS)}")
    return models[name]
