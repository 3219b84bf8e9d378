"""Which clients drop out of a round, before it or during it.

Axis legend: `P` clients of the round's cohort.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from flexmoe_jax.errors import InputError

# Keep the draws of the two stages apart, and from others of the same seed and round.
_STREAMS = {"before": 0xD20B, "during": 0xD20D}


def draw_dropouts(
    probability: float | np.ndarray,
    cohort: np.ndarray,
    *,
    stage: Literal["before", "during"],
    seed: int,
    round_index: int,
) -> np.ndarray:
    """Draws which clients of a cohort drop out.

    A client's draw depends on (stage, seed, round, client id) alone, not on who else takes part.

    Args:
      probability: one for all, or (P,), in [0, 1].
      cohort: (P,) client ids.
      stage: `before` the download, or `during` the work.
      seed: of the run.
      round_index: of the round.

    Returns:
      (P,) bool.

    Raises:
      InputError: a probability outside [0, 1].
    """
    share = np.asarray(probability, np.float64)
    if not ((share >= 0) & (share <= 1)).all():
        raise InputError(f"edge.dropout_{stage}", probability, "give a probability, from 0 to 1")
    cohort = np.asarray(cohort)
    # The first n draws of a generator are the same however many follow.
    draws = int(np.max(cohort, initial=-1)) + 1
    generator = np.random.default_rng([seed, _STREAMS[stage], round_index])
    dropped: np.ndarray = generator.random(draws)[cohort] < share
    return dropped
