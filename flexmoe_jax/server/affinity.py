"""Affinity of clients to experts, inferred from how clients' updates of ψ differ.

Early experts are similar, so the clients' first scores of them are mostly noise. The updates of the
shared parameters, however, depend on a client's data from the first round on, in any task. The
server sketches every update (count sketch; Charikar et al. 2002) and sums over rounds how a
client's sketches differ from the cohort's mean: this sum is the client's profile p_c. It then
decomposes the profiles into D centres v_d, one for each kind of data, such that every profile is
near the mean of k_c centres:

    minimise  Σ_c |p_c - (1/k_c) Σ_d n_cd v_d|² + λ Σ_d |v_d|²  over n_cd ∈ {0, 1, ...},
    Σ_d n_cd = k_c, and v_d,

This is k-means with overlaps (Cleuziou 2008), in the space of the first D - 1 principal components,
in which D centres lie. If several sums of two centres explain a client, the second term prefers two
similar centres, so that kinds are not mixed without need. The gap statistic (Tibshirani et al.
2001), what centres explain beyond what as many explain of profiles without structure, selects the
number of kinds: the least beyond which every further centre adds little. A kind has one expert, or
several if there are fewer kinds than experts.

Under label skew updates differ most by classes, which is not what experts are for: a client knows
its own label shares. If the server sees these shares, profiles can be taken beyond them: what a
ridge regression on the shares explains is subtracted first.

Clients need not be of several kinds at all. If they are, a few principal components explain more of
the profiles than of shuffled profiles (parallel analysis; Horn 1965).

Axis legend: `C` clients, `P` clients of a round's plan, `E` experts, `D` kinds of data, `F` numbers
of a sketch, `M` landmarks: the clients from which the centres are computed, `R` principal
components, `S` searches that run in parallel, `Y` classes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from flexmoe_jax.types import ROUTER, Array, PyTree

# Largest number of landmarks, of values tried for the number of kinds, and of steps of a search.
_LANDMARKS, _KINDS, _STEPS = 512, 8, 30
# Least and largest number of searches, their budget in clients times pairs of kinds, and how many
# searches run to the end (successive halving; Jamieson and Talwalkar 2016).
_SEARCHES, _WORK, _FINALISTS = (4, 100), 500_000, 8
# With more threads, they wait longer for the interpreter's lock than they compute.
_THREADS = 2
# Number of rounds whose updates count in full.
_EARLY = 10
# λ, relative to the average number of clients per centre.
_RIDGE = 0.2
# Ridge of the regression on label shares, in squared shares summed over clients: shares that differ
# by chance alone explain little. From 0.01 to 0.1 it made no difference (results/tried.md).
_SHARE_RIDGE = 0.1
# Gaps, and costs of searches, are nearly equal if they differ by less than this part.
_NEAR = 0.03
# What each further centre must explain, as a part of the mean of those before it.
_WORTH = 0.1
# Least part of the clients with a single kind for which mixtures of kinds are left out.
_OWN = 0.9
# Worth of an expert of a client's kind that is not one of the client's own; its own are worth 1.
_OTHER = 0.5
# Constants that separate the random streams.
_SIGNS, _SEARCH, _CHANCE = 0x5169, 0xAFF1, 0xC4A2


def sketch(update: PyTree, size: int) -> Float[Array, " F"]:
    """Sketches an update: sums (F,) of its numbers with random signs.

    Sketches preserve inner products in expectation. Each array of the update is scaled to length 1,
    so that neither the largest array nor the client with the longest steps dominates. Routers are
    left out: how they move shows which experts the client held, not what its data are.
    """
    total = jnp.zeros(size, jnp.float32)
    for i, (path, leaf) in enumerate(jax.tree.leaves_with_path(update) if size else ()):
        if any(jax.tree_util.keystr((key,), simple=True) == ROUTER for key in path):
            continue
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
    round_index: Int[Array, ""],
) -> Float[Array, "C F"]:
    """Adds a round's sketches (P, F) to the profiles (C, F).

    The mean of the sketches is subtracted, and each difference is scaled to length 1, after
    `_EARLY` rounds to less and less, in inverse proportion to the square of the rounds: the better
    experts fit their clients, the less the shared parameters are pulled in different directions.
    Sketches that were not accepted or are not finite are ignored.
    """
    there = (accepted & jnp.isfinite(sketches).all(axis=1))[:, None]
    count = jnp.maximum(there.sum(dtype=jnp.float32), 1.0)
    mean = jnp.where(there, sketches, 0.0).sum(axis=0, keepdims=True) / count
    own = jnp.where(there, sketches - mean, 0.0)
    length = jnp.sqrt((own**2).sum(axis=1, keepdims=True))
    weight = jnp.minimum(1.0, _EARLY / (jnp.asarray(round_index, jnp.float32) + 1.0)) ** 2
    return profile.at[clients].add(weight * own / jnp.maximum(length, 1e-12), mode="drop")


def affinity(
    profile: Float[np.ndarray, "C F"],
    usage: Float[np.ndarray, "G C E"],
    capacity: Int[np.ndarray, " C"],
    seed: int,
    label_share: Float[np.ndarray, "C Y"] | None = None,
    evidence: float = 0.0,
) -> Float[np.ndarray, "G C E"]:
    """Computes how well each expert matches a client's kinds, times how much the kinds explain.

    Args:
      profile: (C, F); 0 for clients without a profile yet.
      usage: (G, C, E) units that each client has routed to each expert so far. A kind gets the
        experts that its clients have used, so that an expert keeps its kind.
      capacity: (C,) k_c.
      seed: seed of the search.
      label_share: (C, Y) shares of the classes, to leave out what they explain of the profiles; 0
        for clients whose shares are not known. None for the profiles as they are.
      evidence: the least part of the squared differences between profiles that E - 1 principal
        components must explain, beyond label shares and chance, for clients to be of kinds.

    Returns:
      (G, C, E) in [0, 1]; 0 for clients without a profile or without the label shares it needs, and
      for all without that evidence, or while fewer clients have a profile than there are experts
      (of the clients that can have one: until all have, if these are fewer than experts).
    """
    experts = usage.shape[2]
    length = np.linalg.norm(profile, axis=1, keepdims=True)
    able = capacity > 0
    if label_share is not None:
        able &= label_share.any(axis=1)
    known = able & (length[:, 0] > 0)
    if min(experts, known.sum()) < 2 or known.sum() < min(experts, able.sum()):
        return np.zeros(usage.shape)
    unit = np.asarray(profile, np.float64) / np.where(length > 0, length, 1.0)
    rng = np.random.default_rng([seed, _SEARCH])
    marks = np.flatnonzero(known)
    if len(marks) > _LANDMARKS:
        marks = np.sort(rng.choice(marks, _LANDMARKS, replace=False))
    left = 1.0
    if label_share is not None:
        unit, left = _beyond(unit, np.asarray(label_share, np.float64), marks)
    middle = unit[marks].mean(axis=0)
    if evidence and left * _structure(unit[marks] - middle, experts, seed) < evidence:
        return np.zeros(usage.shape)
    used = usage / np.maximum(usage.sum(axis=2, keepdims=True), 1.0)
    kinds = _find_kinds(unit[marks] - middle, capacity[marks], used[:, marks], rng)
    points = (unit - middle) @ kinds.components.T
    made_of = _take_apart(points, kinds.centres[None], capacity, kinds.once)[0]
    made_of = np.where(known[:, None], made_of, 0)
    return kinds.beyond * np.stack([_deal_out(made_of, of_group) for of_group in used])


class _Kinds(NamedTuple):
    """The kinds of data that were found.

    Attributes:
      centres: (D, R) centres in the space of the components.
      components: (R, F) principal components.
      once: whether a client has each kind at most once.
      beyond: in [0, 1]; of the squares that centres do not explain by chance, the part that these
        centres explain.
    """

    centres: np.ndarray
    components: np.ndarray
    once: bool
    beyond: float


class _Tried(NamedTuple):
    """A number of kinds that was tried.

    Attributes:
      gap: squares that the centres explain beyond chance.
      made_of: (M, D) how often each landmark has each kind.
      kinds: the kinds.
    """

    gap: float
    made_of: np.ndarray
    kinds: _Kinds


class _Found(NamedTuple):
    """The best result of several searches.

    Attributes:
      centres: (D, R).
      made_of: (M, D) how often each landmark has each kind.
      explained: squares that the centres explain.
    """

    centres: np.ndarray
    made_of: np.ndarray
    explained: float


def _beyond(
    unit: np.ndarray, label_share: np.ndarray, marks: np.ndarray
) -> tuple[np.ndarray, float]:
    """Subtracts from profiles (C, F) what label shares (C, Y) explain of those of the landmarks.

    Returns:
      what is left, scaled to length 1, and which part of the squared differences this was.
    """
    share = label_share - label_share[marks].mean(axis=0)
    inner = share[marks].T @ share[marks] + _SHARE_RIDGE * np.eye(share.shape[1])
    left = unit - share @ np.linalg.solve(inner, share[marks].T @ unit[marks])
    part = _spread(left[marks]) / max(_spread(unit[marks]), 1e-12)
    return left / np.maximum(np.linalg.norm(left, axis=1, keepdims=True), 1e-12), part


def _spread(points: np.ndarray) -> float:
    """Sum of the squared distances of points (M, F) from their mean."""
    return float(((points - points.mean(axis=0)) ** 2).sum())


def _structure(profiles: np.ndarray, experts: int, seed: int) -> float:
    """Part of the squares that at most E - 1 principal components explain beyond chance."""
    rng = np.random.default_rng([seed, _CHANCE])

    def explained(points: np.ndarray) -> np.ndarray:
        squares = np.linalg.svd(points, compute_uv=False) ** 2
        parts: np.ndarray = np.cumsum(squares)[: experts - 1] / max(squares.sum(), 1e-12)
        return parts

    chance = np.mean([explained(rng.permuted(profiles, axis=0)) for _ in range(2)], axis=0)
    # Components that explain all, with few clients or few numbers, are no evidence.
    return float(((explained(profiles) - chance) / np.maximum(1 - chance, 1e-6)).max())


def _find_kinds(
    profiles: np.ndarray, room: np.ndarray, used: np.ndarray, rng: np.random.Generator
) -> _Kinds:
    """Finds the kinds, in the least number beyond which more centres explain little more.

    Each number is tried in two ways: a client has each kind at most once, or may repeat a kind.
    So that a round does not lose what the rounds before have found, searches start from who has
    used which experts (`used`, (G, M, E)), and of nearly equal results that one is chosen with
    which the most use stays where it was.
    """
    total = float((profiles**2).sum())
    axes = np.linalg.svd(profiles, full_matrices=False)[2]
    shuffled = [rng.permuted(profiles, axis=0) for _ in range(2)]
    of_shuffled = [chance @ np.linalg.svd(chance, full_matrices=False)[2].T for chance in shuffled]
    most = min(used.shape[2], len(profiles))
    numbers = np.unique(np.geomspace(2, most, _KINDS).round().astype(int))
    merged = [_merge(of_group.T @ profiles, of_group.sum(axis=0), numbers) for of_group in used]
    searches = []
    for i, kinds in enumerate(numbers):
        same = [of_expert[i][:, None] == np.arange(kinds) for of_expert in merged]
        starts = [of_group @ kind for of_group, kind in zip(used, same, strict=True)]
        count = int(np.clip(_WORK // (len(room) * kinds**2), *_SEARCHES))
        parts = count, count // 4, count // 4
        for points, part in zip((profiles @ axes.T, *of_shuffled), parts, strict=True):
            wish = rng.random((part, len(room), kinds))
            searches.append((points[:, : kinds - 1], room, wish, starts))
    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(_search_both_ways, *zip(*searches, strict=True)))
    tried: dict[int, list[_Tried]] = {}
    for kinds, real, *chance in zip(numbers, *(results[i::3] for i in range(3)), strict=True):
        for once, found in _own_first(real, room).items():
            by_chance = float(np.mean([of_chance[once].explained for of_chance in chance]))
            gap = found.explained - by_chance
            beyond = max(gap, 0.0) / max(total - by_chance, 1e-12)
            these = _Kinds(found.centres, axes[: kinds - 1], once, beyond)
            tried.setdefault(kinds, []).append(_Tried(gap, found.made_of, these))
    chosen = _elbow(numbers, [max(one.gap for one in tried[kinds]) for kinds in numbers])
    best = max(one.gap for one in tried[chosen])
    every = (one for of_number in tried.values() for one in of_number)
    near = [one for one in every if abs(one.gap - best) <= _NEAR * abs(best)]
    return max(near, key=lambda one: _kept(one.made_of, used)).kinds


def _elbow(numbers: np.ndarray, gaps: list[float]) -> int:
    """Returns the least number of kinds that no larger number improves on by much.

    Clients of one kind differ, too, not only by chance: by their own examples, and by the experts
    that they held. So more centres explain a little more, and the largest gap is at too many.

    Args:
      numbers: values of D, ascending.
      gaps: the squares that so many centres explain beyond chance.
    """
    for i, (kinds, gap) in enumerate(zip(numbers, gaps, strict=True)):
        least = _WORTH * gap / (kinds - 1) * (numbers[i + 1 :] - kinds)
        if gap > 0 and (np.array(gaps[i + 1 :]) - gap <= least).all():
            return int(kinds)
    return int(numbers[np.argmax(gaps)])


def _own_first(found: dict[bool, _Found], room: np.ndarray) -> dict[bool, _Found]:
    """Leaves out mixtures of different kinds if one kind for each client explains as much.

    Three kinds, for example, are also the three pairs of the kinds that mirror them.
    """
    if len(found) == 2:
        mixed, free = found[True], found[False]
        own = (free.made_of.max(axis=1) == room).mean()
        if own > _OWN and free.explained >= (1 - _NEAR) * mixed.explained:
            return {False: free}
    return found


def _kept(made_of: np.ndarray, used: np.ndarray) -> float:
    """Use (G, M, E) that stays where it was, if clients hold the experts of their kinds (M, D)."""
    return round(sum(float(of[_deal_out(made_of, of) == 1].sum()) for of in used), 6)


def _merge(sums: np.ndarray, use: np.ndarray, numbers: np.ndarray) -> list[np.ndarray]:
    """Merges the experts whose users are nearest: for each D of `numbers`, kinds (E,).

    Args:
      sums: (E, F) sums of the users' profiles, by their use.
      use: (E,) sums of the use.
      numbers: values of D, none above E.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage  # The imports take time.
    from scipy.spatial.distance import pdist

    tree = linkage(pdist(sums / np.where(use > 0, use, 1.0)[:, None]), "ward")
    # One by one: if several are given, SciPy 1.17 gives one kind in place of E.
    return [cut_tree(tree, kinds)[:, 0] for kinds in numbers]


def _search_both_ways(
    points: np.ndarray, room: np.ndarray, wish: np.ndarray, starts: list[np.ndarray]
) -> dict[bool, _Found]:
    """Searches with each kind at most once in a client, and with repetition, where possible.

    What is found in the first way is a start for the second, which permits more.
    """
    found = {}
    if wish.shape[2] >= room.max():
        found[True] = _search(points, room, wish, starts, once=True)
        starts = [*starts, found[True].made_of / room[:, None]]
    if room.max() > 1:
        found[False] = _search(points, room, wish, starts, once=False)
    return found


def _search(
    points: np.ndarray, room: np.ndarray, wish: np.ndarray, starts: list[np.ndarray], *, once: bool
) -> _Found:
    """Runs several searches and returns the best result.

    Args:
      points: (M, R) profiles of the landmarks.
      room: (M,) k_c.
      wish: (S, M, D) uniform draws, from which S searches start.
      starts: parts (M, D) that the kinds have in a client, from which other searches start. These
        run to the end, and of nearly equal results theirs is the best.
      once: whether a client has each kind at most once.
    """
    kinds = wish.shape[2]
    ridge = _RIDGE * len(room) / (kinds * room.mean()) * np.eye(kinds)
    drawn = _draw_different(wish, room) if once else _draw(points, room, wish)
    made_of = np.concatenate([room[:, None] * np.stack(starts), drawn])
    least = np.full(len(made_of), np.inf)
    for step in range(_STEPS):
        share = made_of / room[:, None]
        turned = share.swapaxes(1, 2)
        centres = np.linalg.solve(turned @ share + ridge, turned @ points)
        made_of = _take_apart(points, centres, room, once)
        missed = ((points - made_of / room[:, None] @ centres) ** 2).sum(axis=(1, 2))
        # Rounded, so that the choice among searches with equal results is always the same.
        cost = (missed + ridge[0, 0] * (centres**2).sum(axis=(1, 2))).round(9)
        if (cost >= least * (1 - 1e-9)).all():
            break
        least = np.minimum(cost, least)
        if step % 2 and len(cost) > len(starts) + _FINALISTS:
            order = np.argsort(cost[len(starts) :], kind="stable") + len(starts)
            better = np.r_[: len(starts), order[: max(len(cost) // 2, _FINALISTS)]]
            made_of, least = made_of[better], least[better]
    best, of_starts = cost.argmin(), cost[: len(starts)].argmin()
    if cost[of_starts] <= cost[best] * (1 + _NEAR):
        best = of_starts
    return _Found(centres[best], made_of[best], float((points**2).sum() - missed[best]))


def _draw_different(wish: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Draws k_c different kinds for each client: counts (S, M, D)."""
    return wish.argsort(axis=2).argsort(axis=2) < room[:, None]


def _draw(points: np.ndarray, room: np.ndarray, wish: np.ndarray) -> np.ndarray:
    """Draws k_c kinds for each client, with repetition: counts (S, M, D).

    In every other search all kinds of a client are the same: that of the nearest of D clients,
    drawn at random. Kinds of clients that have one each are hardly found from mixtures, since three
    kinds can also be explained as the three pairs of three others.
    """
    kinds = wish.shape[2]
    drawn = np.zeros(wish.shape)
    for step in range(int(room.max())):
        of_step = (wish[:, :, step % kinds] * kinds * (step // kinds + 1)).astype(int) % kinds
        drawn += (np.arange(kinds) == of_step[:, :, None]) & (room > step)[:, None]
    typical = points[wish[1::2, :, 0].argsort(axis=1)[:, :kinds]]  # (S / 2, D, R)
    distance = (typical**2).sum(axis=2)[:, None] - 2 * points @ typical.swapaxes(1, 2)
    nearest = distance.argmin(axis=2)[:, :, None] == np.arange(kinds)
    drawn[1::2] = nearest * room[:, None]
    return drawn


def _take_apart(
    points: np.ndarray, centres: np.ndarray, room: np.ndarray, once: bool
) -> np.ndarray:
    """Chooses k_c kinds for each point, whose mean is near to it: counts (S, M, D).

    Kinds are added one by one, and then exchanged as long as an exchange reduces the distance.
    """
    kinds = centres.shape[1]
    room = np.minimum(room, kinds) if once else room
    most = int(room.max())
    inner = centres @ centres.swapaxes(1, 2)
    length = np.einsum("sdd->sd", inner)[:, None]
    reach = points @ centres.swapaxes(1, 2)  # (S, M, D)
    made_of = np.zeros(reach.shape)
    slots = np.full((*reach.shape[:2], most), kinds)  # The kinds of each point; D in empty slots.
    for step in range(most):
        cost = length - 2 * ((step + 1) * reach - made_of @ inner)
        if once:
            cost[made_of > 0] = np.inf
        chosen = np.where(room > step, cost.argmin(axis=2), kinds)
        slots[:, :, step] = chosen
        made_of += chosen[:, :, None] == np.arange(kinds)
    apart = np.full((len(inner), kinds + 1, kinds), np.inf)  # (S, D leaves, D comes)
    apart[:, :kinds] = length.swapaxes(1, 2) + length - 2 * inner
    apart = apart.reshape(-1, kinds)
    pull = 2 * (room[:, None] * reach - made_of @ inner).reshape(-1, kinds)
    held, slots = made_of.reshape(-1, kinds), slots.reshape(-1, most)
    going = np.arange(len(held))  # A point for which no exchange helps is finished.
    search = going // len(points)
    for _ in range(2 * most):
        rows, mine, own = np.arange(len(going)), slots[going], pull[going]
        comes = np.where(held[going] > 0, -np.inf, own) if once else own
        leaves = own[rows[:, None], np.minimum(mine, kinds - 1)]
        change = apart[search[going][:, None] * (kinds + 1) + mine] - comes[:, None]
        change = (change + leaves[:, :, None]).reshape(len(going), -1)
        pair = change.argmin(axis=1)
        better = change[rows, pair] < -1e-9
        going, (slot, came) = going[better], np.divmod(pair[better], kinds)
        if not len(going):
            break
        left, slots[going, slot] = slots[going, slot], came
        held[going, left] -= 1
        held[going, came] += 1
        pull[going] += 2 * (inner[search[going], left] - inner[search[going], came])
    return made_of


def _deal_out(made_of: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Assigns experts to kinds, and returns the worth (C, E) of each expert to each client.

    A client that has a kind n times values n experts of this kind at 1, and its others at `_OTHER`.

    Args:
      made_of: (C, D) how often each client has each kind.
      used: (C, E) part of a client's units that were routed to each expert so far.
    """
    from scipy.optimize import linear_sum_assignment  # The import takes half a second.

    experts, count = used.shape[1], made_of.sum(axis=0)
    seats = np.ones(made_of.shape[1], int)
    for _ in range(experts - len(seats)):  # D'Hondt: to the kind with most clients per expert
        seats[np.argmax(count / seats)] += 1
    kind = np.repeat(np.arange(len(seats)), seats)
    kind = kind[linear_sum_assignment(used.T @ made_of[:, kind], maximize=True)[1]]  # (E,)
    worth = np.zeros(used.shape)
    for d in range(len(seats)):
        own, of_client = np.flatnonzero(kind == d), made_of[:, d]
        # The experts that the client has used come first, then the others in turn.
        turn = (np.arange(len(own)) - (np.cumsum(of_client) - of_client)[:, None]) % len(own)
        order = np.lexsort((turn, -used[:, own]), axis=1)
        first = order.argsort(axis=1) < of_client[:, None]
        worth[:, own] = np.where(first, 1.0, _OTHER) * (of_client[:, None] > 0)
    return worth
