"""Exact assignments under equal weights, by shortest augmenting paths over the experts.

The assignment is a minimum-cost flow. Its optimum moves holders along paths of experts: some
clients swap e for f, the same number of others swap f for g, and so on. A path needs only the
cheapest client for each swap. So the search graph has E + 1 nodes, for any number of clients. Good
prices are a good start: few paths remain after each client's best choice. A path moves as many
holders at once as there are clients with equally cheap swaps on each of its steps. So ties, which
need many moves, still need few paths.

Loads here are counts of holders. A load y_e has a convex cost φ_e(y_e). Within the bounds it is
zero, apart from balance. Outside them it exceeds any gain in fitness, so bounds are relaxed only if
necessary, by the smallest weighted violation. (Successive shortest paths with convex costs: Ahuja,
Magnanti and Orlin 1993, chapters 9 and 14.)

Costs are whole numbers below 2^53, so their sums are exact. Rounding can therefore never create a
cycle that looks cheaper on every pass.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from flexmoe_jax.assignment.heuristics import row_blocks, take_top
from flexmoe_jax.assignment.problem import BoolArray, FloatArray, IntArray, seconds_left

# The fractional parts of this number's multiples are spread most evenly. With it, clients without a
# preference choose evenly among all experts.
GOLDEN = 0.6180339887498949


class LoadCost(NamedTuple):
    """Convex costs `φ(y)` of loads y, which are counts of holders; all costs are whole numbers.

    Attributes:
      low: [E] minimum load without extra cost.
      high: [E] maximum load without extra cost.
      outside: [E] cost of each unit of load below `low` or above `high`.
      base: [E] gain of each unit of load: prices that were already subtracted from the fitness.
      curve: cost of one squared unit of load off target, or 0.
      target: [E] load at which the `curve` cost is zero.
    """

    low: FloatArray
    high: FloatArray
    outside: FloatArray
    base: FloatArray
    curve: float
    target: FloatArray

    def rise(self, load: FloatArray) -> FloatArray:
        """Computes `φ(y + 1) - φ(y)` [E] at whole loads; it never decreases as y grows."""
        dear = self.outside * ((load >= self.high).astype(float) - (load < self.low))
        return dear + self._inside(load)

    def _inside(self, load: FloatArray) -> FloatArray:
        if not self.curve:
            return -self.base
        return np.rint(self.curve * (2 * (load - self.target) + 1)) - self.base

    def beside(self, decided: FloatArray) -> LoadCost:
        """Returns the cost of further load, beside loads [E] that are decided."""
        low, high = (np.maximum(bound - decided, 0.0) for bound in (self.low, self.high))
        return self._replace(low=low, high=high, target=self.target - decided)

    def start(self, price: FloatArray, load: FloatArray) -> FloatArray:
        """Computes whole loads [E], close to `load`, at which the prices are slopes of φ."""
        total = price + self.base
        if not self.curve:
            near = np.where(total == 0, load, np.where(total > 0, np.inf, -np.inf))
        else:
            near = np.rint(self.target + 0.5 * total / self.curve - 0.5)
            near += self._inside(near) < price
            near -= self._inside(near - 1) > price
        return np.clip(near, self.low, self.high)

    def room(self, load: FloatArray, expert: int, sign: int) -> float:
        """Computes how many units an expert's load can rise, or fall, at the cost of the first."""
        if self.curve:
            return 1.0
        y, low, high = load[expert], self.low[expert], self.high[expert]
        ends = (low, high, np.inf) if sign > 0 else (high, low, 0.0)
        return abs(float(next(end - y for end in ends if sign * (end - y) > 0)))


class Optimum(NamedTuple):
    """The exact optimum.

    Attributes:
      assignment: [C, E] bool.
      prices: [E] optimal prices λ per holder.
      paths: number of augmenting paths that were used.
    """

    assignment: BoolArray
    prices: FloatArray
    paths: int


def augment(
    fitness: FloatArray,
    capacity: IntArray,
    cost: LoadCost,
    start: tuple[FloatArray, BoolArray],
    deadline: float = np.inf,
    most: float = np.inf,
) -> Optimum | None:
    """Maximises `Σ Q x - Σ φ(load)` over assignments, where loads are counts of holders.

    Args:
      fitness: [C, E] whole numbers.
      capacity: [C].
      cost: cost φ of the loads.
      start: [E] whole prices to start from, and the clients' `best_choices` at these prices, of
        shape [C, E]; good prices reduce the number of paths.
      deadline: on the `time.perf_counter` clock.
      most: number of paths after which the search stops.

    Returns:
      The optimum, or None if it needs more paths.

    Raises:
      SolverError: the deadline passed before the optimum was found.
    """
    prices, held = start[0], start[1].T.copy()
    graph = _Graph(np.ascontiguousarray(fitness.T), held)
    root, paths = held.shape[0], 0
    load = cost.start(prices, held.sum(axis=1).astype(np.float64))
    surplus = np.append(held.sum(axis=1) - load, load.sum() - capacity.sum())
    while (surplus > 0).any():
        seconds_left(deadline)
        if paths >= most:
            return None
        path = _shortest_path(_with_root(graph.cost, cost, load), surplus)
        steps = list(pairwise(path))
        # A path that starts or ends at the root changes one load; one through the root changes two.
        moved = [(e, 1) for e, f in steps if f == root] + [(f, -1) for e, f in steps if e == root]
        units = min(surplus[path[0]], -surplus[path[-1]])
        units = min([units, *(cost.room(load, e, sign) for e, sign in moved)])
        if swaps := [step for step in steps if root not in step]:
            units = graph.swap(swaps, int(units))
        surplus[path[0]] -= units
        surplus[path[-1]] += units
        for e, sign in moved:
            load[e] += sign * units
        paths += 1
    return Optimum(held.T, potentials(graph.cost, cost, load), paths)


def best_choices(fitness: FloatArray, prices: FloatArray, capacity: IntArray) -> BoolArray:
    """Takes each client's best experts at integral worths; ties are spread evenly over the experts.

    Args:
      fitness: [C, E] whole numbers.
      prices: [E] whole numbers.
      capacity: [C].

    Returns:
      [C, E] bool.
    """
    held = np.empty(fitness.shape, bool)
    for rows in row_blocks(fitness.shape):
        worth = spread_ties(fitness[rows] - prices, rows.start)
        held[rows] = take_top(worth, capacity[rows])
    return held


def spread_ties(worth: FloatArray, first: int = 0) -> FloatArray:
    """Adds a fraction that breaks ties to whole worths [C, E] of clients from number `first` on.

    The fraction is below one half, so it does not change the order of different worths. Different
    clients prefer different experts.
    """
    clients, experts = worth.shape
    turn = np.add.outer(np.arange(first, first + clients) * GOLDEN, np.arange(experts) / experts)
    return worth + 0.5 * (turn - np.floor(turn))


def swap_costs(fitness: FloatArray, held: BoolArray) -> FloatArray:
    """Computes the cost of the cheapest swap of e for f, [E, E]; fitness and holders are [C, E]."""
    return _Graph(np.ascontiguousarray(fitness.T), held.T.copy()).cost


def potentials(swaps: FloatArray, cost: LoadCost, load: FloatArray) -> FloatArray:
    """Computes prices [E] per holder at which no swap [E, E] and no change of load has a gain.

    They are shortest distances in the residual graph, computed with as many sweeps as it has nodes.
    At an optimum the distances converge, and the prices prove the optimum. Otherwise such prices do
    not exist, and the returned prices prove a weaker bound.
    """
    distance = _distances(_with_root(swaps, cost, load))
    prices: FloatArray = distance[-1] - distance[:-1]
    return prices


class _Graph:
    """The cheapest swaps between experts: `cost[e, f]`, and `best[e, f]`, the client that swaps."""

    def __init__(self, fitness: FloatArray, held: BoolArray) -> None:
        experts = held.shape[0]
        self.fitness = fitness
        self.held = held
        self.cost = np.full((experts, experts), np.inf)
        self.best = np.full((experts, experts), -1)
        self._moved = np.zeros(fitness.shape[1] + 1, bool)
        for e in range(experts):
            self._rescan(e, np.arange(experts))

    def swap(self, steps: list[tuple[int, int]], units: int) -> int:
        """Makes each step's cheapest swap for up to `units` clients; returns the number of clients.

        All swaps of a step cost the same. Several swaps of one client cannot conflict: on a path,
        every expert is given at most once and taken at most once.
        """
        offers: list[IntArray] = []
        for e, f in steps:
            if units == 1:
                break
            offers.append(self._offers(e, f))
            units = min(units, offers[-1].size)
        if units == 1:
            offers = [self.best[e, f : f + 1] for e, f in steps]
        offers = [clients[:units] for clients in offers]
        for clients, (e, f) in zip(offers, steps, strict=True):
            self.held[e, clients], self.held[f, clients] = False, True
        self._refresh(np.unique(np.concatenate(offers)), steps)
        return units

    def _offers(self, e: int, f: int) -> IntArray:
        """Returns the clients with the lowest cost of swapping e for f."""
        holders = np.flatnonzero(self.held[e] & ~self.held[f])
        loss = self.fitness[e].take(holders) - self.fitness[f].take(holders)
        return holders[loss == self.cost[e, f]]

    def _refresh(self, moved: IntArray, steps: list[tuple[int, int]]) -> None:
        """Updates the swaps after the clients `moved` took these steps."""
        self._moved[moved] = True
        # The last entry stands for arcs without a client (`best` is -1).
        stale = self._moved[self.best]
        self._moved[moved] = False
        for row in np.flatnonzero(stale.any(axis=1)).tolist():
            self._rescan(row, np.flatnonzero(stale[row]))
        fitness, held = self.fitness[:, moved], self.held[:, moved]
        for e, f in steps:
            # A client that took f can now swap it for any expert. One that gave e can take it back.
            self._offer(moved, f, slice(None), fitness[f] - fitness, held[f] & ~held)
            self._offer(moved, slice(None), e, fitness - fitness[e], held & ~held[e])

    def _offer(
        self, moved: IntArray, e: int | slice, f: int | slice, loss: FloatArray, can: BoolArray
    ) -> None:
        """Records the loss [E, n] of the clients `moved` for swaps [E] from e or to f, if lower."""
        loss = np.where(can, loss, np.inf)
        lowest = loss.argmin(axis=1)
        least = loss[np.arange(loss.shape[0]), lowest]
        better = least < self.cost[e, f]
        self.cost[e, f] = np.where(better, least, self.cost[e, f])
        self.best[e, f] = np.where(better, moved[lowest], self.best[e, f])

    def _rescan(self, e: int, targets: IntArray) -> None:
        """Finds the best client for swapping e for each target."""
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


def _with_root(swaps: FloatArray, cost: LoadCost, load: FloatArray) -> FloatArray:
    """Adds a root to swap costs [E, E]: e -> root raises e's load, root -> f lowers f's load."""
    experts = load.shape[0]
    arcs = np.full((experts + 1, experts + 1), np.inf)
    arcs[:experts, :experts] = swaps
    arcs[:experts, experts] = cost.rise(load)
    arcs[experts, :experts] = np.where(load > 0, -cost.rise(load - 1), np.inf)
    return arcs


def _shortest_path(arcs: FloatArray, surplus: FloatArray) -> list[int]:
    """Finds the nodes of the cheapest path from any surplus to any shortfall (Bellman-Ford)."""
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
    """Computes the distance [E + 1] to each node if paths may start at any node, at distance 0."""
    distance = np.zeros(arcs.shape[0])
    for _ in range(arcs.shape[0]):
        shorter = np.minimum(distance, (distance[:, None] + arcs).min(axis=0))
        if (shorter == distance).all():
            break
        distance = shorter
    return distance
