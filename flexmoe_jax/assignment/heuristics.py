"""Assignments without optimisation: baselines and starting points.

Every assignment here gives each client exactly `k_c` experts and ignores load bounds. Ties and
random choices use keys that depend only on (seed, client). So a client's experts depend neither on
the order of the clients nor on the other clients in the cohort.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flexmoe_jax.assignment.problem import BoolArray, FloatArray, IntArray

# Numbers that fit into a core's cache together with the temporary arrays computed from them.
_CACHED = 2**16

_Bits = npt.NDArray[np.uint64]


def client_keys(seed: list[int], clients: IntArray, experts: int) -> FloatArray:
    """Draws uniform numbers in [0, 1), [C, E]; each depends only on (seed, client id, expert).

    Uses the finaliser of SplitMix64 (Steele, Lea and Flood 2014) with a seeded start: one pass over
    the array instead of one generator per client.
    """
    start = np.random.default_rng(seed).integers(2**63, size=1, dtype=np.uint64)
    ids: _Bits = np.asarray(clients).astype(np.uint64)
    keys = _mix(ids + start)
    lanes: _Bits = np.arange(1, experts + 1, dtype=np.uint64)
    keys = _mix(keys[:, None] + lanes)
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: _Bits) -> _Bits:
    state = state * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def take_best(score: FloatArray, capacity: IntArray, keys: FloatArray) -> BoolArray:
    """Takes each client's `k_c` experts of highest score; returns [C, E] bool.

    Args:
      score: [C, E] scores.
      capacity: [C] number of experts to take.
      keys: [C, E] tie-breakers; of equal scores the smaller key wins.
    """
    order = np.lexsort((keys, -score), axis=-1)
    taken = np.arange(score.shape[1]) < capacity[:, None]
    assignment = np.zeros(score.shape, bool)
    np.put_along_axis(assignment, order, taken, axis=1)
    return assignment


def take_top(score: FloatArray, capacity: IntArray) -> BoolArray:
    """Like `take_best`, but breaks ties arbitrarily: several times faster; returns [C, E] bool."""
    assignment = np.zeros(score.shape, bool)
    for rows in row_blocks(score.shape):
        part, count = score[rows], capacity[rows]
        slots = int(np.max(count, initial=0))
        if 0 < slots < score.shape[1]:
            best = np.argpartition(-part, slots - 1, axis=1)[:, :slots]
            order = np.argsort(-np.take_along_axis(part, best, axis=1), axis=1)
            best = np.take_along_axis(best, order, axis=1)
        else:
            best = np.argsort(-part, axis=1)[:, :slots]
        taken = np.arange(slots) < count[:, None]
        np.put_along_axis(assignment[rows], best, taken, axis=1)
    return assignment


def row_blocks(shape: tuple[int, ...]) -> list[slice]:
    """Splits the rows of a [C, E] array into slices whose temporary copies stay in cache."""
    rows, columns = shape
    height = max(1, _CACHED // max(1, columns))
    return [slice(first, min(first + height, rows)) for first in range(0, rows, height)]


def take_random(capacity: IntArray, keys: FloatArray) -> BoolArray:
    """Takes `k_c` experts per client uniformly at random by keys [C, E]; returns [C, E] bool."""
    return take_best(-keys, capacity, keys)


def take_in_turn(capacity: IntArray, clients: IntArray, turn: int, experts: int) -> BoolArray:
    """Gives client c the experts `(c + turn + 0 .. k_c - 1) mod E`; returns [C, E] bool."""
    offset = (np.arange(experts) - clients[:, None] - turn) % experts
    return offset < capacity[:, None]
