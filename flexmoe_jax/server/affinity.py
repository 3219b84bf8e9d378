"""Which experts suit a client, told by how its updates of ψ differ from others'.

Early experts are alike, so that what clients say of them is chance; but the updates of what all
share differ from the first round on by what a client's examples are like, whatever the task. Every
update is sketched (count sketch; Charikar et al. 2002), and what makes a client's sketches differ
from the cohort's is added up over rounds: its profile. Profiles p_c are then taken apart into one
centre for each expert, such that every client lies in the middle of as many as it may hold:

    minimise  Σ_c |p_c - (1/k_c) Σ_e a_ce v_e|²  over a_ce ∈ {0, 1}, Σ_e a_ce = k_c, and v_e,

k-means with overlaps (Cleuziou 2008), in the space of the first E - 1 principal components, in
which E centres lie. How far a client is made of an expert's centre is its affinity to the expert.
It counts as far as the centres explain more than they would of profiles without any structure
(parallel analysis; Horn 1965).

Axis legend: `C` clients, `P` clients of a round's plan, `E` experts, `F` numbers of a sketch, `M`
landmarks: the clients that the centres are found from, `R` principal components.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from flexmoe_jax.types import Array, PyTree

# Most landmarks, and steps of a search; least and most searches, and what they may cost together
# in clients times pairs of experts.
_LANDMARKS, _STEPS = 512, 30
_STARTS, _WORK = (4, 100), 3_000_000
# What keeps a centre where it is that nobody is a member of.
_RIDGE = 1e-3
# Names of random streams.
_SIGNS, _SEARCH = 0x5169, 0xAFF1


def sketch(update: PyTree, size: int) -> Array:
    """(F,) sums of an update's numbers with random signs, which keep inner products as they are.

    Each array of the update counts at length 1, so that neither the largest alone is heard, nor who
    takes the longest steps.
    """
    total = jnp.zeros(size, jnp.float32)
    for i, leaf in enumerate(jax.tree.leaves(update) if size else ()):
        flat = leaf.astype(jnp.float32).ravel()
        flat = flat / jnp.maximum(jnp.linalg.norm(flat), 1e-12)
        padded = jnp.pad(flat, (0, -flat.size % size))
        bits = jax.random.bits(jax.random.fold_in(jax.random.key(_SIGNS), i), padded.shape, "uint8")
        total += jnp.where(bits & 1, padded, -padded).reshape(-1, size).sum(axis=0)
    return total


def learn_profile(profile: Array, clients: Array, sketches: Array, accepted: Array) -> Array:
    """Adds a round's sketches (P, F), each less their mean and at length 1, to profiles (C, F).

    Updates that were not accepted, or are not all numbers, tell nothing.
    """
    there = (accepted & jnp.isfinite(sketches).all(axis=1))[:, None]
    count = jnp.maximum(there.sum(dtype=jnp.float32), 1.0)
    mean = jnp.where(there, sketches, 0.0).sum(axis=0, keepdims=True) / count
    own = jnp.where(there, sketches - mean, 0.0)
    length = jnp.sqrt((own**2).sum(axis=1, keepdims=True))
    return profile.at[clients].add(own / jnp.maximum(length, 1e-12), mode="drop")


def affinity(profile: np.ndarray, usage: np.ndarray, capacity: np.ndarray, seed: int) -> np.ndarray:
    """How far each client is made of each expert's centre, times how much the centres explain.

    Args:
      profile: (C, F); 0 of clients that are not known yet.
      usage: (G, C, E) units that each client has routed to each expert so far: centres are given to
        the experts that their clients have used, so that an expert keeps its own.
      capacity: (C,) k_c.
      seed: of the search.

    Returns:
      (G, C, E) in [0, 1]; 0 while fewer clients are known than there are experts.
    """
    experts = usage.shape[2]
    length = np.linalg.norm(profile, axis=1, keepdims=True)
    known = (length[:, 0] > 0) & (capacity > 0)
    if experts < 2 or known.sum() < experts:
        return np.zeros(usage.shape)
    unit = np.asarray(profile, np.float64) / np.where(length > 0, length, 1.0)
    rng = np.random.default_rng([seed, _SEARCH])
    marks = np.flatnonzero(known)
    if len(marks) > _LANDMARKS:
        marks = np.sort(rng.choice(marks, _LANDMARKS, replace=False))
    used = usage / np.maximum(usage.sum(axis=2, keepdims=True), 1.0)
    found = _find_centres(unit[marks], capacity[marks], used[0, marks], rng)
    shuffled = rng.permuted(unit[marks], axis=0)
    chance = _find_centres(shuffled, capacity[marks], used[0, marks], rng).explained
    beyond = max(found.explained - chance, 0.0) / max(1.0 - chance, 1e-12)
    room = np.maximum(capacity, 1)[:, None]
    weight = _weights(unit @ found.components.T, found.centres, room)
    share = np.where(known[:, None], np.minimum(room * weight, 1.0), 0.0)
    order = [linear_sum_assignment(of_group.T @ share, maximize=True)[1] for of_group in used]
    return beyond * np.stack([share[:, of_group] for of_group in order])


class _Centres(NamedTuple):
    """Centres (E, R) in the space of components (R, F), and the part of squares explained."""

    centres: np.ndarray
    components: np.ndarray
    explained: float


def _find_centres(
    profiles: np.ndarray, room: np.ndarray, used: np.ndarray, rng: np.random.Generator
) -> _Centres:
    """The best of several searches: one from the experts used so far, the others from any."""
    clients, experts = used.shape
    components = np.linalg.svd(profiles, full_matrices=False)[2][: experts - 1]
    points = profiles @ components.T
    starts = int(np.clip(_WORK // (clients * experts**2), *_STARTS))
    missed, centres = _search(points, _top(used, room), room)
    for wish in rng.random((starts, clients, experts)):
        other = _search(points, _top(wish, room), room)
        missed, centres = min((missed, centres), other, key=lambda search: search[0])
    total = float((profiles**2).sum())
    return _Centres(centres, components, (float((points**2).sum()) - missed) / total)


def _top(wish: np.ndarray, room: np.ndarray) -> np.ndarray:
    """(M, E) bool, the k_c columns of every row that are greatest."""
    rank = np.argsort(np.argsort(-wish, axis=1, kind="stable"), axis=1)
    return np.asarray(rank < room[:, None])


def _search(points: np.ndarray, member: np.ndarray, room: np.ndarray) -> tuple[float, np.ndarray]:
    """Centres and memberships in turn, until neither moves: squares missed, and centres (E, R)."""
    missed = np.inf
    for _ in range(_STEPS):
        share = member / room[:, None]
        inner = share.T @ share + _RIDGE * np.eye(member.shape[1])
        centres = np.linalg.solve(inner, share.T @ points)
        member = _choose(points, centres, room)
        before = missed
        missed = float(((points - member / room[:, None] @ centres) ** 2).sum())
        if missed >= before * (1 - 1e-9):
            break
    return missed, centres


def _choose(points: np.ndarray, centres: np.ndarray, room: np.ndarray) -> np.ndarray:
    """(M, E) bool, the k_c centres whose mean is nearest: one after the other, then exchanged."""
    rows = np.arange(len(points))
    member = np.zeros((len(points), len(centres)), bool)
    length = (centres**2).sum(axis=1)
    for step in range(int(room.max())):
        rest = (step + 1) * points - member @ centres
        cost = np.where(member, np.inf, length - 2 * rest @ centres.T)
        grows = room > step
        member[rows[grows], cost[grows].argmin(axis=1)] = True
    apart = ((centres[:, None] - centres[None]) ** 2).sum(axis=-1)  # (E leaves, E comes)
    for _ in range(2 * int(room.max())):
        reach = (room[:, None] * points - member @ centres) @ centres.T
        change = apart + 2 * (reach[:, :, None] - reach[:, None, :])
        change[~(member[:, :, None] & ~member[:, None, :])] = np.inf
        flat = change.reshape(len(points), -1)
        pair = flat.argmin(axis=1)
        better = flat[rows, pair] < -1e-12
        if not better.any():
            break
        leaves, comes = np.divmod(pair[better], len(centres))
        member[rows[better], leaves], member[rows[better], comes] = False, True
    return member


def _weights(points: np.ndarray, centres: np.ndarray, room: np.ndarray) -> np.ndarray:
    """(C, E) ≥ 0 with sums 1, none above 1/k_c, whose mean of centres is nearest to each point."""
    step = 1.0 / max(float(np.linalg.norm(centres, 2)) ** 2, 1e-12)
    weight = np.full((len(points), len(centres)), 1.0 / len(centres))
    for _ in range(10 * _STEPS):
        moved = weight - step * (weight @ centres - points) @ centres.T
        weight = _capped(moved, 1.0 / room)
    return weight


def _capped(values: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Nearest rows that are between 0 and the most, and sum to 1: by bisection of the shift."""
    low, high = values.min(axis=1, keepdims=True) - 1, values.max(axis=1, keepdims=True)
    for _ in range(40):
        middle = (low + high) / 2
        above = (values - middle).clip(0, most).sum(axis=1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (values - high).clip(0, most)
