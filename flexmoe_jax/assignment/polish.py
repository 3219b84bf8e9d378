"""Local search that improves an assignment and never makes it worse.

Moves: a client swaps one expert that it holds for one that it does not; two clients exchange
experts; in small problems, two clients swap at once. A move must not push any expert further out
of its bounds, so the guarantees of rounding on violations stay valid. Moves that repair bounds may
cost value, up to a given limit.

Axis legend: `C` clients, `E` experts, `H` held pairs that are considered.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexmoe_jax.assignment.problem import (
    TINY,
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
    expert_load,
)
from flexmoe_jax.assignment.tiles import gram

_MOVES = 1000
# If there are more swaps than this, the search considers only the clients closest to a change.
_SWAPS = 200_000
_EXCHANGE_PAIRS = 400
_DOUBLE_SWAPS = 400
_STEP = 1e-9


class _State(NamedTuple):
    """The sums over an assignment that moves change.

    Attributes:
      fitness: of all held pairs.
      load: [E].
      holders: [E].
      mix: [E, F] sum of the holders' deviations.
    """

    fitness: float
    load: FloatArray
    holders: IntArray
    mix: FloatArray


def polish(problem: Problem, assignment: BoolArray, prices: FloatArray, least: float) -> BoolArray:
    """Improves an assignment until no move helps.

    Args:
      problem: the problem to solve.
      assignment: [C, E] bool, the starting point; not modified.
      prices: [E] prices on load, used to select the clients to consider.
      least: bounds are repaired as long as the value stays at or above this.

    Returns:
      [C, E] bool. No expert's violation is larger than before. The value is not lower, or it is at
      or above `least` and violations are smaller.
    """
    held = assignment.copy()
    rows = _nearest(problem, held, prices)
    fitness = float(problem.fitness[held].sum())
    load, mix = expert_load(problem, held), gram(held, problem.deviation)
    state = _State(fitness, load.astype(np.float64), held.sum(axis=0), mix)
    for _ in range(_MOVES):
        moves = _best_move(problem, held, state, rows, _value(problem, state) - least)
        if moves is None:
            break
        for move in moves:
            state = _after(problem, held, state, *move)
    return held


def _value(problem: Problem, state: _State) -> float:
    """Computes the objective, as `problem.objective` does from the assignment."""
    off = state.load - problem.load_target if problem.balance else np.zeros(1)
    terms = problem.balance * float(off @ off)
    return state.fitness - terms - problem.diversity * float(np.abs(state.mix).sum())


def _after(problem: Problem, held: BoolArray, state: _State, client: int, e: int, f: int) -> _State:
    """Lets a client give expert e for expert f: changes `held`, and returns the sums after it."""
    held[client, e], held[client, f] = False, True
    gain = problem.fitness[client, f] - problem.fitness[client, e]
    weight, z = problem.weights[client], problem.deviation[client]
    load, holders, mix = state.load.copy(), state.holders.copy(), state.mix.copy()
    load[e], load[f] = load[e] - weight[e], load[f] + weight[f]
    holders[e], holders[f] = holders[e] - 1, holders[f] + 1
    mix[e], mix[f] = mix[e] - z, mix[f] + z
    return _State(state.fitness + float(gain), load, holders, mix)


def _nearest(problem: Problem, held: BoolArray, prices: FloatArray) -> IntArray:
    clients, experts = held.shape
    slots = max(1, int(held.sum(axis=1).max(initial=0)))
    most = max(1, _SWAPS // (experts * slots))
    if clients <= most:
        return np.arange(clients)
    reduced = problem.fitness - problem.weights * prices
    worst_in = np.min(reduced, axis=1, where=held, initial=np.inf)
    best_out = np.max(reduced, axis=1, where=~held, initial=-np.inf)
    return np.sort(np.argpartition(worst_in - best_out, most)[:most])


def _best_move(
    problem: Problem, held: BoolArray, state: _State, rows: IntArray, budget: float
) -> list[tuple[int, int, int]] | None:
    """Finds the move that repairs most per value lost or, if none repairs, the largest gain."""
    row, expert = np.nonzero(held[rows])
    client = rows[row]
    if client.size == 0:
        return None
    found: list[tuple[_Rank, list[tuple[int, int, int]]]] = []
    swaps = _swaps(problem, held, state, client, expert)
    if best := _choose(*swaps, budget):
        h, f = best[1]
        found.append((best[0], [(int(client[h]), int(expert[h]), f)]))
    if client.size <= _EXCHANGE_PAIRS:
        exchanges = _exchanges(problem, held, state, client, expert)
        if best := _choose(*exchanges, budget):
            g, h = best[1]
            first = (int(client[g]), int(expert[g]), int(expert[h]))
            found.append((best[0], [first, (int(client[h]), int(expert[h]), int(expert[g]))]))
    plain = not (problem.diversity or problem.balance or np.any(problem.holders_min))
    few = 0 < np.count_nonzero(~held[client]) <= _DOUBLE_SWAPS
    if not found and plain and few and problem.expert_size is None:
        places = np.argwhere(~held[client])
        doubles = _double_swaps(problem, state, client, expert, swaps[0], places)
        if best := _choose(*doubles, budget):
            found.append(
                (
                    best[0],
                    [
                        (int(client[h]), int(expert[h]), int(f))
                        for h, f in (places[best[1][0]], places[best[1][1]])
                    ],
                )
            )
    return max(found, key=lambda move: move[0])[1] if found else None


_Scored = tuple[FloatArray, FloatArray, BoolArray]
_Rank = tuple[int, float]


def _choose(
    gain: FloatArray, mended: FloatArray, allowed: BoolArray, budget: float
) -> tuple[_Rank, tuple[int, int]] | None:
    """Returns rank and index of the best move; moves that repair bounds rank before gains."""
    mends = allowed & (mended > _STEP) & (gain >= -max(budget, 0.0))
    if mends.any():
        price = np.where(mends, gain / np.where(mends, mended, 1.0), -np.inf)
        place = np.unravel_index(int(price.argmax()), price.shape)
        return (1, float(price[place])), (int(place[0]), int(place[1]))
    gains = np.where(allowed & (mended >= -_STEP), gain, -np.inf)
    place = np.unravel_index(int(gains.argmax()), gains.shape)
    if not gains[place] > _STEP:
        return None
    return (0, float(gains[place])), (int(place[0]), int(place[1]))


def _swaps(
    problem: Problem, held: BoolArray, state: _State, client: IntArray, expert: IntArray
) -> _Scored:
    """Computes gain, repaired violation and admissibility [H, E] of giving pair h for expert f."""
    weight = problem.weights
    out, into = weight[client, expert][:, None], weight[client]
    gain = problem.fitness[client] - problem.fitness[client, expert][:, None]
    gain = gain + _load_terms(problem, state, expert[:, None], -out)
    gain = gain + _load_terms(problem, state, np.arange(held.shape[1])[None], into)
    if problem.diversity:
        z = problem.deviation[client]
        before = np.abs(state.mix).sum(axis=1)
        leaves = np.abs(state.mix[expert] - z).sum(axis=1) - before[expert]
        enters = np.abs(state.mix[None] + z[:, None]).sum(axis=2) - before
        gain = gain - problem.diversity * (leaves[:, None] + enters)
    of_e = _mended(problem, state, expert[:, None], -out, -1)
    of_f = _mended(problem, state, np.arange(held.shape[1])[None], into, 1)
    allowed = ~held[client] & (of_e >= -_STEP) & (of_f >= -_STEP)
    if problem.expert_size is not None:
        size = np.asarray(problem.expert_size)
        room = problem.capacity * (1.0 + TINY) - np.einsum("ce,e->c", held, size)
        allowed &= size - size[expert][:, None] <= room[client][:, None]
    return gain, of_e + of_f, allowed


def _exchanges(
    problem: Problem, held: BoolArray, state: _State, client: IntArray, expert: IntArray
) -> _Scored:
    """Computes the same, [H, H], for two pairs that exchange their experts."""
    weight, fitness = problem.weights, problem.fitness
    own = weight[client, expert]
    crossed = weight[client[:, None], expert[None]]
    gain = fitness[client[:, None], expert[None]] - fitness[client, expert][:, None]
    gain = gain + gain.T
    change = crossed.T - own[:, None]
    terms = _load_terms(problem, state, expert[:, None], change)
    gain = gain + terms + terms.T
    if problem.diversity:
        z = problem.deviation[client]
        difference = z[None] - z[:, None]
        after = np.abs(state.mix[expert][:, None] + difference).sum(axis=2)
        loss = after - np.abs(state.mix[expert]).sum(axis=1)[:, None]
        gain = gain - problem.diversity * (loss + loss.T)
    mended = _mended(problem, state, expert[:, None], change, 0)
    free = ~held[client[:, None], expert[None]]
    allowed = free & free.T & (mended >= -_STEP) & (mended.T >= -_STEP)
    if problem.expert_size is not None:
        size = np.asarray(problem.expert_size)
        room = problem.capacity * (1.0 + TINY) - np.einsum("ce,e->c", held, size)
        fits = size[expert][None] - size[expert][:, None] <= room[client][:, None]
        allowed &= fits & fits.T
    return gain, mended + mended.T, allowed


def _double_swaps(
    problem: Problem,
    state: _State,
    client: IntArray,
    expert: IntArray,
    gain: FloatArray,
    places: IntArray,
) -> _Scored:
    """Computes the same for two simultaneous swaps by different clients, at `places` (h, f)."""
    h, f = places.T
    count = np.arange(h.size)
    change = np.zeros((h.size, problem.experts))
    change[count, expert[h]] -= problem.weights[client[h], expert[h]]
    change[count, f] += problem.weights[client[h], f]

    def violation(load: FloatArray) -> FloatArray:
        return np.maximum(np.maximum(problem.load_min - load, load - problem.load_max), 0.0)

    both = violation(state.load + change[:, None] + change[None])
    mended = (violation(state.load) - both) * np.asarray(problem.violation_weight)
    allowed = (mended >= -_STEP).all(axis=2) & (client[h][:, None] != client[h])
    single = gain[h, f]
    return single[:, None] + single, mended.sum(axis=2), allowed


def _load_terms(
    problem: Problem, state: _State, expert: IntArray, change: FloatArray
) -> FloatArray:
    """Computes the gain in the balance term if the loads of `expert` change."""
    if not problem.balance:
        return np.zeros(change.shape)
    off = (state.load - problem.load_target)[expert]
    return -problem.balance * change * (2 * off + change)


def _mended(
    problem: Problem, state: _State, expert: IntArray, change: FloatArray, holders: int
) -> FloatArray:
    """Computes by how much `expert`'s weighted violation shrinks if its load and holders change."""
    low, high = problem.load_min[expert], problem.load_max[expert]
    load = state.load[expert]
    before = np.maximum(np.maximum(low - load, load - high), 0.0)
    after = np.maximum(np.maximum(low - load - change, load + change - high), 0.0)
    mended = before - after
    if holders and np.any(problem.holders_min):
        lack = np.asarray(problem.holders_min)[expert] - state.holders[expert]
        mended = mended + np.maximum(lack, 0.0) - np.maximum(lack - holders, 0.0)
    return np.asarray(problem.violation_weight)[expert] * mended
