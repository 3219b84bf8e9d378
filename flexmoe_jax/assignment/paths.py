"""Exact assignments under equal weights, by shortest augmenting paths over the experts.

The assignment is a minimum-cost flow whose optimum moves one holder at a time along a path of
experts: some client swaps e for f, another f for g, and so on. Whoever is best placed for each
swap is all that a path needs to know, so paths are sought in a graph of E + 1 nodes, however many
clients there are. Started at the clients' best choices under good prices, few paths remain.

Loads are counts of holders here. Load y_e costs φ_e(y_e), convex: nothing within the bounds, and
beyond them more than any fitness can repay, so that bounds give way only where they must, by the
smallest weighted violation. (Successive shortest paths with convex costs: Ahuja, Magnanti and
Orlin 1993, chapters 9 and 14.)

Costs are whole numbers below 2^53: their sums are exact, so rounding can never leave a cycle that
looks cheaper each time round.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from flexmoe_jax.assignment.heuristics import take_top
from flexmoe_jax.assignment.problem import BoolArray, FloatArray, IntArray, seconds_left

# A load cost: the extra cost [E] of raising every expert's load y [E] by one.
Marginal = Callable[[FloatArray], FloatArray]


class Optimum(NamedTuple):
    """The exact optimum.

    Attributes:
      assignment: [C, E] bool.
      prices: [E] optimal prices λ per holder.
      paths: how many augmenting paths it took.
    """

    assignment: BoolArray
    prices: FloatArray
    paths: int


def augment(
    fitness: FloatArray,
    capacity: IntArray,
    marginal: Marginal,
    prices: FloatArray,
    start: FloatArray,
    deadline: float = np.inf,
) -> Optimum:
    """Best assignment for `Σ Q x - Σ φ(load)`, loads being counts of holders.

    Args:
      fitness: [C, E] whole numbers.
      capacity: [C].
      marginal: `φ(y + 1) - φ(y)` for whole y [E], whole numbers; never falls as y grows.
      prices: [E] whole prices to start from; good ones save paths.
      start: [E] whole loads at which the prices are slopes of φ:
        `marginal(start - 1) <= prices <= marginal(start)`.
      deadline: on the clock of `time.perf_counter`.

    Raises:
      SolverError: the deadline passed before the optimum was found.
    """
    held = take_top(fitness - prices, capacity).T.copy()
    graph = _Graph(fitness.T.copy(), held)
    load = np.array(start, np.float64)
    surplus = np.append(held.sum(axis=1) - load, load.sum() - capacity.sum())
    paths = 0
    while (surplus > 0).any():
        seconds_left(deadline)
        path = _shortest_path(_with_root(graph.cost, marginal, load), surplus)
        surplus[path[0]] -= 1
        surplus[path[-1]] += 1
        root = held.shape[0]
        steps = list(pairwise(path))
        for e, f in steps:
            if f == root:
                load[e] += 1
            elif e == root:
                load[f] -= 1
        graph.swap([(e, f) for e, f in steps if root not in (e, f)])
        paths += 1
    distance = _distances(_with_root(graph.cost, marginal, load))
    return Optimum(held.T, distance[-1] - distance[:-1], paths)


class _Graph:
    """Cheapest swaps between experts: `cost[e, f]` and the client that `best[e, f]` offers it."""

    def __init__(self, fitness: FloatArray, held: BoolArray) -> None:
        experts = held.shape[0]
        self.fitness = fitness
        self.held = held
        self.cost = np.full((experts, experts), np.inf)
        self.best = np.full((experts, experts), -1)
        for e in range(experts):
            self._rescan(e, np.arange(experts))

    def swap(self, steps: list[tuple[int, int]]) -> None:
        """Carries out the cheapest swap of each step and brings the graph up to date."""
        moves = [(int(self.best[e, f]), e, f) for e, f in steps]
        for client, e, f in moves:
            self.held[e, client], self.held[f, client] = False, True
        for client in {move[0] for move in moves}:
            self._refresh(client)

    def _refresh(self, client: int) -> None:
        for e, f in np.argwhere(self.best == client):
            self._rescan(int(e), np.array([f]))
        holds = np.flatnonzero(self.held[:, client])
        free = np.flatnonzero(~self.held[:, client])
        pairs = np.ix_(holds, free)
        worth = self.fitness[:, client]
        offer = worth[holds][:, None] - worth[free]
        better = offer < self.cost[pairs]
        self.cost[pairs] = np.where(better, offer, self.cost[pairs])
        self.best[pairs] = np.where(better, client, self.best[pairs])

    def _rescan(self, e: int, targets: IntArray) -> None:
        """Finds the best client for swapping e against each target."""
        holders = np.flatnonzero(self.held[e])
        if holders.size == 0:
            self.cost[e, targets], self.best[e, targets] = np.inf, -1
            return
        if targets.size == 1:
            rows = int(targets[0])
            loss = self.fitness[e].take(holders) - self.fitness[rows].take(holders)
            loss[self.held[rows].take(holders)] = np.inf
            best = int(loss.argmin())
            self.cost[e, rows], self.best[e, rows] = loss[best], holders[best]
        else:
            losses = self.fitness[e, holders] - self.fitness[np.ix_(targets, holders)]
            losses[self.held[np.ix_(targets, holders)]] = np.inf
            lowest = losses.argmin(axis=1)
            self.cost[e, targets] = losses[np.arange(targets.size), lowest]
            self.best[e, targets] = holders[lowest]
        self.best[e, np.isinf(self.cost[e])] = -1


def _with_root(cost: FloatArray, marginal: Marginal, load: FloatArray) -> FloatArray:
    """Swap costs [E, E] plus a root: e -> root raises the load of e, root -> f lowers that of f."""
    experts = load.shape[0]
    arcs = np.full((experts + 1, experts + 1), np.inf)
    arcs[:experts, :experts] = cost
    arcs[:experts, experts] = marginal(load)
    arcs[experts, :experts] = np.where(load > 0, -marginal(load - 1), np.inf)
    return arcs


def _shortest_path(arcs: FloatArray, surplus: FloatArray) -> list[int]:
    """Nodes of the cheapest path from any surplus to any shortfall (Bellman and Ford)."""
    nodes = np.arange(arcs.shape[0])
    distance = np.where(surplus > 0, 0.0, np.inf)
    before = np.full(arcs.shape[0], -1)
    for _ in range(arcs.shape[0]):
        through = distance[:, None] + arcs
        via = through.argmin(axis=0)
        reached = through[via, nodes]
        shorter = reached < distance
        if not shorter.any():
            break
        distance = np.where(shorter, reached, distance)
        before = np.where(shorter, via, before)
    last = int(np.argmin(np.where(surplus < 0, distance, np.inf)))
    path = [last]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]


def _distances(arcs: FloatArray) -> FloatArray:
    """Distance [E + 1] from the nearest node, where every node may start at 0."""
    distance = np.zeros(arcs.shape[0])
    for _ in range(arcs.shape[0]):
        shorter = np.minimum(distance, (distance[:, None] + arcs).min(axis=0))
        if (shorter == distance).all():
            break
        distance = shorter
    return distance
