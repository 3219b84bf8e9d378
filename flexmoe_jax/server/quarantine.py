"""Quarantine: limits on the length of updates, learnt from the updates of earlier cohorts.

An update has two parts, which are judged separately: ψ, and all experts that the client used. The
length of a part is its L2 norm over the square root of the local steps that the server planned. A
client cannot forge this number. A client with 100 steps moves farther than a client with one step,
but not 100 times. A part is too long if it exceeds both a multiple of the recent median and the
usual spread of lengths around their cohort's median. The spread matters late in training: most
clients then have little to learn, and the few that have more must not be refused.

The mean is accumulated while the cohort trains, so the limits come from earlier rounds. In the
first round no limit is known yet: if an update then turns out to be too long compared with its own
cohort, it is `late` and the whole sum of that round is discarded. The limits are valid as long as
most updates are honest. Refused updates count for the median, so that the limits follow a change of
all clients, but not for the spread, which they would inflate.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Bool, Float

from flexmoe_jax.types import Array, PyTree

# Number of values kept in each row, and the largest number added per round.
_WINDOW, _PER_ROUND = 256, 16
# A length is outside the spread if its logarithm exceeds the median's by this many deviations. Of
# 44,000 honest updates, on digits, EMNIST digits and CIFAR-10, those beyond 10 medians were at 4.4
# deviations or less.
_OUTSIDE = 5.5
# Ratio of a normal distribution's standard deviation to its median absolute deviation.
_NORMAL = 1.4826


def init_norms() -> Float[Array, "4 W"]:
    """Returns the initial records (4, W); 0 marks an empty entry.

    The first two rows are the lengths of ψ and of the experts. The last two are the factors by
    which these lengths were longer or shorter than the median of their cohort.
    """
    return jnp.zeros((4, _WINDOW), jnp.float32)


def learn_norms(
    norms: Float[Array, "4 W"], new: Float[Array, "2 P"], honest: Bool[Array, " P"]
) -> Float[Array, "4 W"]:
    """Adds a round's lengths to the records, and drops the oldest entries.

    If a round has many lengths, it adds only some, at evenly spaced ranks.

    Args:
      norms: (4, W) from `init_norms` or the round before; the newest entries come first.
      new: (2, P) lengths of the round, in any order; 0 for clients without a length.
      honest: (P,) bool, clients whose update was neither refused nor late.

    Returns:
      (4, W) the new records.
    """
    new = jnp.concatenate([new, _spread(jnp.where(honest, new, 0.0))])
    ranked = jnp.sort(new, axis=1)
    count = (ranked > 0).sum(axis=1, keepdims=True, dtype=jnp.int32)
    taken = jnp.minimum(count, _PER_ROUND)
    place = jnp.arange(_PER_ROUND, dtype=jnp.int32)[None]
    # In integers: the i-th of m values, chosen from n, has rank ⌊(i + 1/2) n / m⌋.
    rank = (2 * place + 1) * count // (2 * jnp.maximum(taken, 1))
    chosen = jnp.take_along_axis(ranked, new.shape[1] - count + rank, axis=1, mode="clip")
    joined = jnp.concatenate([chosen, norms], axis=1)
    # The first `taken` of the chosen, then the records: their empty entries are already the last.
    column = jnp.arange(norms.shape[1], dtype=jnp.int32)[None]
    source = jnp.where(column < taken, column, column - taken + _PER_ROUND)
    return jnp.take_along_axis(joined, source, axis=1, mode="clip")


def norm_limits(norms: Float[Array, "4 W"], factor: float) -> Float[Array, " 2"]:
    """Computes the greatest allowed lengths.

    Args:
      norms: (4, W) records of earlier rounds.
      factor: multiple of the median that is always allowed.

    Returns:
      (2,) limits for ψ and for the experts; infinite while there are no records.
    """
    median, spread = jnp.split(_median(norms), 2)
    deviation = _NORMAL * jnp.log(jnp.maximum(spread, 1.0))
    limits = median * jnp.maximum(factor, jnp.exp(_OUTSIDE * deviation))
    return jnp.where(median > 0, limits, jnp.inf)


def too_late(
    norms: Float[Array, "4 W"], new: Float[Array, "2 P"], factor: float
) -> Bool[Array, " P"]:
    """Finds late updates: admitted without a limit, and too long compared with their cohort.

    Args:
      norms: (4, W) records before the round.
      new: (2, P) lengths of the round.
      factor: allowed multiple of the cohort's median; the spread is used only in later rounds.

    Returns:
      (P,) bool, the late updates.
    """
    unknown = ~(norms[:2] > 0).any(axis=1, keepdims=True)
    return (unknown & (new > factor * _median(new)[:, None])).any(axis=0)


def part_norms(shared: PyTree, experts: PyTree) -> Float[Array, " 2"]:
    """Returns the L2 norms (2,) of the two parts of an update: ψ and the experts."""
    norms = [optax.tree.norm(shared), optax.tree.norm(experts)]
    return jnp.stack([jnp.asarray(norm, jnp.float32) for norm in norms])


def _spread(new: Array) -> Array:
    """Returns the factor (2, P) between each length and their median; 0 for missing lengths."""
    median = _median(new)[:, None]
    there = new > 0
    value, middle = jnp.where(there, new, 1.0), jnp.where(there, median, 1.0)
    factor = jnp.maximum(value / middle, middle / value)
    return jnp.where(there, factor, 0.0)


def _median(values: Array) -> Array:
    """Returns the lower median of each row's values above 0; 0 for a row without values."""
    count = (values > 0).sum(axis=1, dtype=jnp.int32)
    # The lower median of n values is the (⌊n/2⌋ + 1)-th largest; a sort would take longer.
    largest, _ = lax.top_k(values, values.shape[1] // 2 + 1)
    return jnp.take_along_axis(largest, count[:, None] // 2, axis=1, mode="clip")[:, 0]
