"""Rounds fractions to an assignment, with a guarantee.

The method is Shmoys and Tardos (1993, "An approximation algorithm for the generalized assignment
problem"), extended to clients that hold several experts and to loads bounded from both sides:

- For each expert, clients with a fraction of it are sorted by decreasing weight and poured into
  bins of volume one.
- A flow gives every client its whole capacity, uses each pair (c, e) at most once, and gives each
  bin exactly one client. (The last, partly filled bin of an expert gets at most one.)

The fractions are such a flow, and the network's matrix is totally unimodular. So an integral flow
of at least the same value exists. Each full bin holds exactly one client. It is no heavier than any
client of the previous bin and no lighter than any client of the next one. Hence:

    Σ Q x̂ ≥ Σ Q x,   every client holds exactly k_c,   |load(x̂)_e - load(x)_e| ≤ max_c w_ce,

where the maximum is over the clients with a fraction of e. Only fractional pairs enter the flow.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

import numpy as np

from flexmoe_jax.assignment.linear import Rows, maximise
from flexmoe_jax.assignment.problem import (
    TINY,
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
    SolverError,
)

# Fractions closer to 0 or 1 than this are solver noise.
_FRACTION = 1e-6


def round_shmoys_tardos(problem: Problem, x: FloatArray) -> BoolArray:
    """Rounds fractions `x` [C, E] of the relaxation to an assignment [C, E] bool."""
    assignment = x >= 1.0 - _FRACTION
    client, expert = np.nonzero((x > _FRACTION) & ~assignment)
    if client.size == 0:
        return assignment
    remaining = problem.capacity - assignment.sum(axis=1)
    pair, bin_of, full = _pour(x[client, expert], problem.weights[client, expert], expert)
    chosen = _integral_flow(client, expert, pair, bin_of, full, problem.fitness, remaining)
    assignment[client[chosen], expert[chosen]] = True
    return assignment


def round_knapsack(problem: Problem, x: FloatArray) -> BoolArray:
    """Rounds fractions of a problem with expert sizes down, then fills each client's free capacity.

    A pair is filled in if it has a gain, or if its expert lacks load or holders. The result keeps
    capacities, and upper load bounds if the relaxation keeps them. Loads and holders may be below
    the lower bounds. A vertex has few fractions, so the loss is small, but no fraction of the value
    is guaranteed.
    """
    size, floor = np.asarray(problem.expert_size), np.asarray(problem.holders_min)
    weight, target, z = problem.weights, problem.load_target, problem.deviation
    assignment = np.zeros(x.shape, bool)
    room = np.array(problem.capacity, np.float64)
    load, holders = np.zeros(problem.experts), np.zeros(problem.experts)
    mix = np.zeros((problem.experts, z.shape[1]))
    # Pairs that the relaxation chose come first, then those of highest fitness.
    order = np.argsort(-(x + TINY * problem.fitness), axis=None, kind="stable")
    for client, e in zip(*np.unravel_index(order, x.shape), strict=True):
        if size[e] > room[client] + TINY * problem.capacity[client]:
            continue
        more, mixed = load[e] + weight[client, e], mix[e] + z[client]
        if x[client, e] < 1.0 - _FRACTION:
            gain = problem.fitness[client, e]
            if problem.balance:
                gain -= problem.balance * ((more - target[e]) ** 2 - (load[e] - target[e]) ** 2)
            if problem.diversity:
                gain -= problem.diversity * (np.abs(mixed).sum() - np.abs(mix[e]).sum())
            wanted = gain > 0 or load[e] < problem.load_min[e] or holders[e] < floor[e]
            if not wanted or more > problem.load_max[e] + TINY * load[e]:
                continue
        assignment[client, e] = True
        room[client] -= size[e]
        load[e], mix[e] = more, mixed
        holders[e] += 1
    return assignment


def _pour(
    fraction: FloatArray, weight: FloatArray, expert: IntArray
) -> tuple[IntArray, IntArray, BoolArray]:
    """Pours pairs into bins of volume one, heaviest first.

    Returns:
      `pair` and `bin`, the two ends of each edge, and whether each bin is full.
    """
    pair: list[int] = []
    bin_of: list[int] = []
    full: list[bool] = []
    for e in np.unique(expert):
        members = np.flatnonzero(expert == e)
        members = members[np.argsort(-weight[members], kind="stable")]
        end = np.cumsum(fraction[members])
        begin = np.concatenate(([0.0], end[:-1]))
        first_bin = len(full)
        bins = max(1, int(np.ceil(end[-1] - _FRACTION)))
        for index, low, high in zip(members, begin, end, strict=True):
            for b in range(int(low + _FRACTION), bins):
                if b + _FRACTION >= high:
                    break
                pair.append(int(index))
                bin_of.append(first_bin + b)
        full += [b + 1 <= end[-1] + _FRACTION for b in range(bins)]
    return np.array(pair), np.array(bin_of), np.array(full)


def _integral_flow(
    client: IntArray,
    expert: IntArray,
    pair: IntArray,
    bin_of: IntArray,
    full: BoolArray,
    fitness: FloatArray,
    remaining: IntArray,
) -> IntArray:
    """Returns the pairs of the best integral flow; a simplex vertex of this network is integral."""
    owners, owner = np.unique(client[pair], return_inverse=True)
    found = maximise(
        fitness[client[pair], expert[pair]],
        Rows(owner, 1.0, remaining[owners], remaining[owners]),
        Rows(pair, 1.0, np.zeros(client.size), np.ones(client.size)),
        Rows(bin_of, 1.0, full.astype(np.float64), np.ones(full.size)),
    )
    if found is None:
        raise SolverError("the rounding flow has no solution")
    return pair[found.x > 0.5]
