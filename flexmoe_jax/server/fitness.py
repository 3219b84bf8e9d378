"""The client-expert fitness Q, learnt from training feedback (FLEX-MoE)."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jaxtyping import Float, Int

from flexmoe_jax.options.server import FitnessOptions
from flexmoe_jax.types import Array, Feedback

Score = Callable[[Feedback], Array]
"""Feedback (..., K) -> score (..., K) of each pair, in [0, 1]; void where `usage` is 0."""


def accuracy_score(feedback: Feedback) -> Array:
    """Score a: the share of the units routed to the expert that were right."""
    return feedback.correct / _usage(feedback)


def loss_score(alpha: float = 1.0) -> Score:
    """Score exp(-α l), with l the mean loss of the units routed to the expert."""

    def score(feedback: Feedback) -> Array:
        return jnp.exp(-alpha * feedback.loss / _usage(feedback))

    return score


def _usage(feedback: Feedback) -> Array:
    """What to divide by; units that are routed in parts, or in some layers only, can be below 1."""
    return jnp.where(feedback.usage > 0, feedback.usage, 1.0)


def make_score(options: FitnessOptions) -> Score:
    """The score that the options name, or bring along."""
    if callable(options.score):
        return options.score
    return {"accuracy": accuracy_score, "loss": loss_score(options.alpha)}[options.score]


def update_fitness(
    fitness: Float[Array, "C E"],
    clients: Int[Array, " P"],
    slots: Int[Array, "P K"],
    feedback: Feedback,
    options: FitnessOptions,
) -> Float[Array, "C E"]:
    """Q ← (1-β) Q + β s for every held pair with feedback; all others keep their value.

    Args:
      fitness: (C, E) Q.
      clients: (P,) int32 the cohort; C marks padding.
      slots: (P, K) int32 the experts held; E marks an empty slot.
      feedback: (P, K).
      options: β and the score.

    Returns:
      (C, E) the new Q.
    """
    chex.assert_rank([clients, slots], [1, 2])
    chex.assert_equal_shape([slots, *feedback])
    rows = clients[:, None]
    held = fitness.at[rows, slots].get(mode="fill", fill_value=0.0)  # (P, K)
    learnt = (1 - options.beta) * held + options.beta * make_score(options)(feedback)
    return fitness.at[rows, slots].set(jnp.where(feedback.usage > 0, learnt, held), mode="drop")
