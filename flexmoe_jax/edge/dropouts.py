"""Draw which clients drop out of a round, before it or during it.

Axis legend: `P` clients of the round's cohort.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from flexmoe_jax.errors import InputError

# Separate the draws of the two stages from each other, and from others of the same seed and round.
_STREAMS = {"before": 0xD20B, "during": 0xD20D}


def draw_dropouts(
    probability: float | np.ndarray,
    cohort: np.ndarray,
    *,
    stage: Literal["before", "during"],
    seed: int,
    round_index: int,
) -> np.ndarray:
    """Draw which clients of a cohort drop out.

    A client's draw depends only on (stage, seed, round, client id), not on the rest of the cohort.

    Args:
      probability: one value for all clients, or (P,), in [0, 1].
      cohort: (P,) client ids.
      stage: `before` the download, or `during` the work.
      seed: seed of the run.
      round_index: index of the round.

    Returns:
      (P,) bool, true for clients that drop out.

    Raises:
      InputError: if a probability is outside [0, 1].
    """
    share = np.asarray(probability, np.float64)
    if not ((share >= 0) & (share <= 1)).all():
        raise InputError(f"edge.dropout_{stage}", probability, "give a probability, from 0 to 1")
    cohort = np.asarray(cohort)
    # The first n numbers of a generator do not depend on how many numbers are drawn.
    draws = int(np.max(cohort, initial=-1)) + 1
    generator = np.random.default_rng([seed, _STREAMS[stage], round_index])
    dropped: np.ndarray = generator.random(draws)[cohort] < share
    return dropped
