"""How long an honest update is, learnt from the cohorts themselves.

An update has two parts, each judged by itself: ψ, and all experts that its client used. A part's
length is its L2 norm over the square root of the local steps that the server planned for the
client, which no client can forge: a client of 100 steps goes farther than one of a single step, but
not 100 times. A length is too great that is more than some times the median of lately, or far
outside the spread of a cohort's lengths around their own median: late in training most clients have
little to learn, and the few that have more must not be refused for it.

A mean is summed while the cohort trains, so what is known comes from earlier rounds. Before the
first there is nothing: what then turns out to be too long for its own cohort is `late`, and the
whole sum counts for nothing. All this holds as long as most updates are honest. Lengths of refused
ones count for the median too, so that limits follow when all change, but not for the spread, which
they would blow up.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float

from flexmoe_jax.types import Array, PyTree

# Values kept of each kind, and most of a round.
_WINDOW, _PER_ROUND = 256, 16
# Deviations of the logarithm at which a length is outside the spread. Of 44,000 honest updates, on
# digits, EMNIST digits and CIFAR-10, those beyond 10 medians lay at 4.4 or less.
_OUTSIDE = 5.5
# Of a normal distribution's deviation over its median absolute one.
_NORMAL = 1.4826


def init_norms() -> Float[Array, "4 W"]:
    """(4, W) nothing known yet, which 0 stands for.

    The rows are lengths of ψ and of the experts, then by what factor each of these was longer or
    shorter than the median of its cohort.
    """
    return jnp.zeros((4, _WINDOW), jnp.float32)


def learn_norms(
    norms: Float[Array, "4 W"], new: Float[Array, "2 P"], honest: Bool[Array, " P"]
) -> Float[Array, "4 W"]:
    """Adds a round's lengths, as evenly spaced ranks if they are many, and drops the oldest.

    Args:
      norms: (4, W) from `init_norms`, or the round before; the newest come first.
      new: (2, P) the round's, in any order; 0 for clients without a length.
      honest: (P,) bool, those that no limit speaks against.

    Returns:
      (4, W).
    """
    new = jnp.concatenate([new, _spread(jnp.where(honest, new, 0.0))])
    ranked = jnp.sort(new, axis=1)
    count = (ranked > 0).sum(axis=1, keepdims=True, dtype=jnp.int32)
    taken = jnp.minimum(count, _PER_ROUND)
    place = jnp.arange(_PER_ROUND, dtype=jnp.int32)[None]
    # In whole numbers: rank ⌊(i + 1/2) n / m⌋ is that of the i-th of m values out of n.
    rank = (2 * place + 1) * count // (2 * jnp.maximum(taken, 1))
    chosen = jnp.take_along_axis(ranked, new.shape[1] - count + rank, axis=1, mode="clip")
    joined = jnp.concatenate([jnp.where(place < taken, chosen, 0.0), norms], axis=1)
    newest = jnp.argsort(joined == 0, axis=1, stable=True)[:, : norms.shape[1]]
    return jnp.take_along_axis(joined, newest, axis=1)


def norm_limits(norms: Float[Array, "4 W"], factor: float) -> Float[Array, " 2"]:
    """The greatest lengths that are let in.

    Args:
      norms: (4, W) what is known.
      factor: how many times the median they may be in any case.

    Returns:
      (2,) limits of ψ and of the experts; infinite where nothing is known.
    """
    median, spread = jnp.split(_median(norms), 2)
    deviation = _NORMAL * jnp.log(jnp.maximum(spread, 1.0))
    limits = median * jnp.maximum(factor, jnp.exp(_OUTSIDE * deviation))
    return jnp.where(median > 0, limits, jnp.inf)


def too_late(
    norms: Float[Array, "4 W"], new: Float[Array, "2 P"], factor: float
) -> Bool[Array, " P"]:
    """Updates that were let in, since nothing was known yet, and are too long for their cohort.

    Args:
      norms: (4, W) what was known.
      new: (2, P) the round's lengths.
      factor: how many times the median they may be; the spread is that of later rounds.

    Returns:
      (P,) bool.
    """
    unknown = ~(norms[:2] > 0).any(axis=1, keepdims=True)
    return (unknown & (new > factor * _median(new)[:, None])).any(axis=0)


def part_norms(shared: PyTree, experts: PyTree) -> Float[Array, " 2"]:
    """(2,) L2 norms of ψ's part and the experts' of one update."""
    norms = [optax.tree.norm(shared), optax.tree.norm(experts)]
    return jnp.stack([jnp.asarray(norm, jnp.float32) for norm in norms])


def _spread(new: Array) -> Array:
    """(2, P): by what factor each length (2, P) differs from the median of all; 0 for none."""
    median = _median(new)[:, None]
    there = new > 0
    value, middle = jnp.where(there, new, 1.0), jnp.where(there, median, 1.0)
    factor = jnp.maximum(value / middle, middle / value)
    return jnp.where(there, factor, 0.0)


def _median(values: Array) -> Array:
    """Of each row's values above 0; of an even number, the lower one in the middle; 0 of none."""
    ranked = jnp.sort(values, axis=1)
    count = (ranked > 0).sum(axis=1, dtype=jnp.int32)
    # The values come after the zeros.
    middle = ranked.shape[1] - count + (count - 1) // 2
    return jnp.take_along_axis(ranked, middle[:, None], axis=1, mode="clip")[:, 0]
