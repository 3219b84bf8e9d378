"""The client-expert fitness Q, which the server learns from training feedback (FLEX-MoE)."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jaxtyping import Float, Int

from flexmoe_jax.errors import InputError
from flexmoe_jax.options.server import FitnessOptions
from flexmoe_jax.types import Array, Feedback

Score = Callable[[Feedback], Array]
"""Feedback (..., K) -> score (..., K) of each pair, in [0, 1]; meaningless where `usage` is 0."""


def accuracy_score(feedback: Feedback) -> Array:
    """Score a: the fraction of the units routed to the expert that were predicted correctly."""
    return feedback.correct / _usage(feedback)


def loss_score(alpha: float = 1.0) -> Score:
    """Makes the score exp(-α l), where l is the mean loss of the units routed to the expert."""

    def score(feedback: Feedback) -> Array:
        return jnp.exp(-alpha * feedback.loss / _usage(feedback))

    return score


def _usage(feedback: Feedback) -> Array:
    """Returns the divisor: `usage`, or 1 where it is 0.

    Usage can be between 0 and 1 if units are routed in parts, or in some layers only.
    """
    return jnp.where(feedback.usage > 0, feedback.usage, 1.0)


def make_score(options: FitnessOptions) -> Score:
    """Returns the score that the options name, or their own score function."""
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
    """Updates Q ← (1-β) Q + β s for every held pair with feedback; other pairs keep their value.

    Args:
      fitness: (C, E) Q.
      clients: (P,) int32 the cohort; C marks padding.
      slots: (P, K) int32 the experts held; E marks an empty slot.
      feedback: (P, K) feedback of each pair.
      options: β and the score.

    Returns:
      (C, E) the new Q.

    Raises:
      InputError: the score is not of shape (P, K).
    """
    chex.assert_rank([clients, slots], [1, 2])
    chex.assert_equal_shape([slots, *feedback])
    rows = clients[:, None]
    held = fitness.at[rows, slots].get(mode="fill", fill_value=0.0)  # (P, K)
    score = make_score(options)(feedback)
    if jnp.shape(score) != slots.shape:
        found, remedy = f"a function to {jnp.shape(score)}", f"give one score a pair: {slots.shape}"
        raise InputError("fitness.score", found, remedy)
    learnt = (1 - options.beta) * held + options.beta * score
    return fitness.at[rows, slots].set(jnp.where(feedback.usage > 0, learnt, held), mode="drop")
