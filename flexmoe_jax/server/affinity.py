"""Which experts suit a client, told by how its updates of ψ differ from others'.

Early experts are alike, so that what clients say of them is chance; but the updates of what all
share differ from the first round on by what a client's examples are like, whatever the task. Every
update is sketched (count sketch; Charikar et al. 2002), and what makes a client's sketches differ
from the cohort's is added up over rounds: its profile. Profiles p_c are then taken apart into D
centres v_d, one for each kind of data, such that every client lies in the middle of k_c of them:

    minimise  Σ_c |p_c - (1/k_c) Σ_d n_cd v_d|² + λ Σ_d |v_d|²  over n_cd ∈ {0, 1, ...},
    Σ_d n_cd = k_c, and v_d,

k-means with overlaps (Cleuziou 2008), in the space of the first D - 1 principal components, in
which D centres lie. Of a sum of two centres that explains a client, the second term prefers the one
of two like centres, so that kinds are not mixed where they need not be. How many kinds there are is
told by the gap statistic (Tibshirani et al. 2001): where the centres explain most beyond what as
many would of profiles without any structure. A kind has one expert, or several where there are
fewer kinds than experts.

Axis legend: `C` clients, `P` clients of a round's plan, `E` experts, `D` kinds of data, `F` numbers
of a sketch, `M` landmarks: the clients that the centres are found from, `R` principal components,
`S` searches that run side by side.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from flexmoe_jax.types import Array, PyTree

# Most landmarks, numbers of kinds that are tried, and steps of a search.
_LANDMARKS, _KINDS, _STEPS = 512, 8, 30
# Least and most searches, what they may cost in clients times pairs of kinds, and how many of them
# are followed to the end (successive halving; Jamieson and Talwalkar 2016).
_SEARCHES, _WORK, _FINALISTS = (16, 100), 3_000_000, 8
# More threads than this wait for the interpreter's lock more than they compute.
_THREADS = 2
# λ, in clients that each centre has on average.
_RIDGE = 0.2
# An expert of a client's kind that is not its own is worth so much of one that is.
_OTHER = 0.5
# Names of random streams.
_SIGNS, _SEARCH = 0x5169, 0xAFF1


def sketch(update: PyTree, size: int) -> Float[Array, " F"]:
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


def learn_profile(
    profile: Float[Array, "C F"],
    clients: Int[Array, " P"],
    sketches: Float[Array, "P F"],
    accepted: Bool[Array, " P"],
) -> Float[Array, "C F"]:
    """Adds a round's sketches (P, F), each less their mean and at length 1, to profiles (C, F).

    Updates that were not accepted, or are not all numbers, tell nothing.
    """
    there = (accepted & jnp.isfinite(sketches).all(axis=1))[:, None]
    count = jnp.maximum(there.sum(dtype=jnp.float32), 1.0)
    mean = jnp.where(there, sketches, 0.0).sum(axis=0, keepdims=True) / count
    own = jnp.where(there, sketches - mean, 0.0)
    length = jnp.sqrt((own**2).sum(axis=1, keepdims=True))
    return profile.at[clients].add(own / jnp.maximum(length, 1e-12), mode="drop")


def affinity(
    profile: Float[np.ndarray, "C F"],
    usage: Float[np.ndarray, "G C E"],
    capacity: Int[np.ndarray, " C"],
    seed: int,
) -> Float[np.ndarray, "G C E"]:
    """How far each expert is of a client's kinds, times how much kinds explain.

    Args:
      profile: (C, F); 0 of clients that are not known yet.
      usage: (G, C, E) units that each client has routed to each expert so far: kinds are given the
        experts that their clients have used, so that an expert keeps its own.
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
    middle = unit[marks].mean(axis=0)
    kinds = _find_kinds(unit[marks] - middle, capacity[marks], experts, rng)
    points = (unit - middle) @ kinds.components.T
    made_of = _take_apart(points, kinds.centres[None], capacity, kinds.once)[0]
    made_of = np.where(known[:, None], made_of, 0)
    used = usage / np.maximum(usage.sum(axis=2, keepdims=True), 1.0)
    return kinds.beyond * np.stack([_deal_out(made_of, of_group) for of_group in used])


class _Kinds(NamedTuple):
    """Kinds of data, as found.

    Attributes:
      centres: (D, R) in the space of the components.
      components: (R, F).
      once: whether a client has no kind more than once.
      beyond: part of the squares that chance leaves which they explain, in [0, 1].
    """

    centres: np.ndarray
    components: np.ndarray
    once: bool
    beyond: float


def _find_kinds(
    profiles: np.ndarray, room: np.ndarray, experts: int, rng: np.random.Generator
) -> _Kinds:
    """Kinds in that number whose centres explain most beyond chance.

    Tried both ways: a client has no kind twice, or may be of one kind alone.
    """
    total = float((profiles**2).sum())
    axes = np.linalg.svd(profiles, full_matrices=False)[2]
    shuffled = [rng.permuted(profiles, axis=0) for _ in range(2)]
    of_shuffled = [chance @ np.linalg.svd(chance, full_matrices=False)[2].T for chance in shuffled]
    numbers = np.unique(np.geomspace(2, experts, _KINDS).round().astype(int))
    most = room.max()
    tried, searches = [], []
    for kinds, once in itertools.product(numbers, (True, False)):
        if (kinds < most) if once else (most == 1):  # Too few, or no other way than once.
            continue
        tried.append((kinds, once))
        count = int(np.clip(_WORK // (len(room) * kinds**2), *_SEARCHES))
        parts = count, count // 4, count // 4
        for points, part in zip((profiles @ axes.T, *of_shuffled), parts, strict=True):
            wish = rng.random((part, len(room), kinds))
            searches.append((points[:, : kinds - 1], room, wish, once))
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_search, *zip(*searches, strict=True)))
    best, gap = None, -np.inf
    for (kinds, once), (centres, explained), *chance in zip(
        tried, found[::3], found[1::3], found[2::3], strict=True
    ):
        by_chance = float(np.mean([explained for _, explained in chance]))
        if explained - by_chance > gap:
            gap = explained - by_chance
            beyond = max(gap, 0.0) / max(total - by_chance, 1e-12)
            best = _Kinds(centres, axes[: kinds - 1], once, beyond)
    assert best is not None
    return best


def _search(
    points: np.ndarray, room: np.ndarray, wish: np.ndarray, once: bool
) -> tuple[np.ndarray, float]:
    """The best of several searches: centres (D, R), and the squares that they explain.

    Args:
      points: (M, R).
      room: (M,) k_c.
      wish: (S, M, D) uniform draws, from which searches begin.
      once: whether a client has no kind more than once.
    """
    searches, _, kinds = wish.shape
    ridge = _RIDGE * len(room) / (kinds * room.mean()) * np.eye(kinds)
    rank = wish.argsort(axis=2).argsort(axis=2)
    made_of = (rank < room[:, None]) if once else _draw(wish, room)
    least = np.full(searches, np.inf)
    for step in range(_STEPS):
        share = made_of / room[:, None]
        turned = share.swapaxes(1, 2)
        centres = np.linalg.solve(turned @ share + ridge, turned @ points)
        made_of = _take_apart(points, centres, room, once)
        missed = ((points - made_of / room[:, None] @ centres) ** 2).sum(axis=(1, 2))
        # Rounded, so that of searches that end alike it is always the same that is taken.
        cost = (missed + ridge[0, 0] * (centres**2).sum(axis=(1, 2))).round(9)
        if (cost >= least * (1 - 1e-9)).all():
            break
        least = np.minimum(cost, least)
        if step % 2 and len(cost) > _FINALISTS:
            better = np.argsort(cost, kind="stable")[: max(len(cost) // 2, _FINALISTS)]
            made_of, least = made_of[better], least[better]
    best = cost.argmin()
    return centres[best], float((points**2).sum() - missed[best])


def _draw(wish: np.ndarray, room: np.ndarray) -> np.ndarray:
    """(S, M, D) k_c draws of kinds, which may be the same."""
    kinds = wish.shape[2]
    drawn = np.zeros(wish.shape)
    for step in range(int(room.max())):
        of_step = (wish[:, :, step % kinds] * kinds * (step // kinds + 1)).astype(int) % kinds
        drawn += (np.arange(kinds) == of_step[:, :, None]) & (room > step)[:, None]
    return drawn


def _take_apart(
    points: np.ndarray, centres: np.ndarray, room: np.ndarray, once: bool
) -> np.ndarray:
    """(S, M, D) how often each point has each kind: k_c in all, whose mean is nearest to it.

    One after the other, then exchanged as long as it helps.
    """
    most, kinds = int(room.max()), centres.shape[1]
    inner = centres @ centres.swapaxes(1, 2)
    length = np.einsum("sdd->sd", inner)[:, None]
    reach = points @ centres.swapaxes(1, 2)  # (S, M, D)
    made_of = np.zeros(reach.shape)
    for step in range(most):
        cost = length - 2 * ((step + 1) * reach - made_of @ inner)
        if once:
            cost[made_of > 0] = np.inf
        chosen = cost.argmin(axis=2)[:, :, None] == np.arange(kinds)
        made_of += chosen & (room > step)[:, None]
    apart = length.swapaxes(1, 2) + length - 2 * inner  # (S, D leaves, D comes)
    pull = 2 * (room[:, None] * reach - made_of @ inner).reshape(-1, kinds)
    held = made_of.reshape(-1, kinds)
    going = np.arange(len(held))  # A point at which no exchange helps has come to its end.
    search = going // len(points)
    for _ in range(2 * most):
        has, own = held[going] > 0, pull[going]
        leaves, comes = np.where(has, own, np.inf), np.where(has & once, -np.inf, own)
        change = leaves[:, :, None] - comes[:, None] + apart[search[going]]
        flat = change.reshape(len(going), -1)
        pair = flat.argmin(axis=1)
        better = flat[np.arange(len(going)), pair] < -1e-9
        going, (left, came) = going[better], np.divmod(pair[better], kinds)
        if not len(going):
            break
        held[going, left] -= 1
        held[going, came] += 1
        pull[going] += 2 * (inner[search[going], left] - inner[search[going], came])
    return made_of


def _deal_out(made_of: np.ndarray, used: np.ndarray) -> np.ndarray:
    """(C, E) 1 for as many experts of each of its kinds as a client has it, less for the others.

    Args:
      made_of: (C, D) how often each client has each kind.
      used: (C, E) part of a client's units that went to each expert so far.
    """
    from scipy.optimize import linear_sum_assignment  # Takes half a second: for those who ask.

    experts, count = used.shape[1], made_of.sum(axis=0)
    seats = np.ones(made_of.shape[1], int)
    for _ in range(experts - len(seats)):  # D'Hondt: to whom has most for each of its experts
        seats[np.argmax(count / seats)] += 1
    kind = np.repeat(np.arange(len(seats)), seats)
    kind = kind[linear_sum_assignment(used.T @ made_of[:, kind], maximize=True)[1]]  # (E,)
    worth = np.zeros(used.shape)
    for d in range(len(seats)):
        own, of_client = np.flatnonzero(kind == d), made_of[:, d]
        # What a client has used of them before others, then in turn.
        turn = (np.arange(len(own)) - (np.cumsum(of_client) - of_client)[:, None]) % len(own)
        order = np.lexsort((turn, -used[:, own]), axis=1)
        first = order.argsort(axis=1) < of_client[:, None]
        worth[:, own] = np.where(first, 1.0, _OTHER) * (of_client[:, None] > 0)
    return worth
