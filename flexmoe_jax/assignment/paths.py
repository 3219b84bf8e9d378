"""Exact assignments under equal weights, by shortest augmenting paths over the experts.

The assignment is a minimum-cost flow whose optimum moves holders along paths of experts: some
clients swap e for f, as many others f for g, and so on. Whoever is best placed for each swap is all
that a path needs to know, so paths are sought in a graph of E + 1 nodes, however many clients there
are. Started at the clients' best choices under good prices, few paths remain; and a path carries
as many holders at once as there are clients equally well placed for each of its swaps, so ties,
which make for many holders to move, make for few paths.

Loads are counts of holders here. Load y_e costs φ_e(y_e), convex: nothing within the bounds, and
beyond them more than any fitness can repay, so that bounds give way only where they must, by the
smallest weighted violation. (Successive shortest paths with convex costs: Ahuja, Magnanti and
Orlin 1993, chapters 9 and 14.)

Costs are whole numbers below 2^53: their sums are exact, so rounding can never leave a cycle that
looks cheaper each time round.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from flexmoe_jax.assignment.heuristics import row_blocks, take_top
from flexmoe_jax.assignment.problem import BoolArray, FloatArray, IntArray, seconds_left

# The step whose multiples' fractions spread most evenly: clients who are indifferent choose evenly
# among all experts.
GOLDEN = 0.6180339887498949


class LoadCost(NamedTuple):
    """Convex costs `φ(y)` of loads y, which are counts of holders; all costs are whole numbers.

    Attributes:
      low: [E] least load that costs nothing extra.
      high: [E] greatest.
      outside: [E] cost of each unit of load beyond those.
      base: [E] what each unit of load earns: prices that were taken off the fitness before.
      curve: cost of one squared unit of load off target, or 0.
      target: [E].
    """

    low: FloatArray
    high: FloatArray
    outside: FloatArray
    base: FloatArray
    curve: float
    target: FloatArray

    def rise(self, load: FloatArray) -> FloatArray:
        """`φ(y + 1) - φ(y)` [E] at whole loads; never falls as y grows."""
        dear = self.outside * ((load >= self.high).astype(float) - (load < self.low))
        return dear + self._inside(load)

    def _inside(self, load: FloatArray) -> FloatArray:
        if not self.curve:
            return -self.base
        return np.rint(self.curve * (2 * (load - self.target) + 1)) - self.base

    def start(self, price: FloatArray, load: FloatArray) -> FloatArray:
        """Whole loads [E], near to `load`, at which prices are slopes of φ."""
        total = price + self.base
        if not self.curve:
            near = np.where(total == 0, load, np.where(total > 0, np.inf, -np.inf))
        else:
            near = np.rint(self.target + 0.5 * total / self.curve - 0.5)
            near += self._inside(near) < price
            near -= self._inside(near - 1) > price
        return np.clip(near, self.low, self.high)

    def room(self, load: FloatArray, expert: int, sign: int) -> float:
        """How many units the load of an expert can rise, or fall, at the cost of the first."""
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
      paths: how many augmenting paths it took.
    """

    assignment: BoolArray
    prices: FloatArray
    paths: int


def augment(
    fitness: FloatArray,
    capacity: IntArray,
    cost: LoadCost,
    prices: FloatArray,
    deadline: float = np.inf,
    most: float = np.inf,
) -> Optimum | None:
    """Best assignment for `Σ Q x - Σ φ(load)`, loads being counts of holders.

    Args:
      fitness: [C, E] whole numbers.
      capacity: [C].
      cost: of loads, φ.
      prices: [E] whole prices to start from; good ones save paths.
      deadline: on the clock of `time.perf_counter`.
      most: paths after which to give up.

    Returns:
      The optimum, or None after too many paths.

    Raises:
      SolverError: the deadline passed before the optimum was found.
    """
    held = best_choices(fitness, prices, capacity).T.copy()
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
        # A path that starts or ends at the root changes one load, one that passes it changes two.
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
    """Each client's best experts at whole worths; among equal ones loads come out even.

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
    """Whole worths [C, E] of clients from number `first` on, and a part of one that breaks ties.

    Less than half of one, so that no order changes; and each client prefers another expert.
    """
    clients, experts = worth.shape
    turn = np.add.outer(np.arange(first, first + clients) * GOLDEN, np.arange(experts) / experts)
    return worth + 0.5 * (turn - np.floor(turn))


def swap_costs(fitness: FloatArray, held: BoolArray) -> FloatArray:
    """What the cheapest swap of e for f costs, [E, E], for fitness and holders [C, E]."""
    return _Graph(np.ascontiguousarray(fitness.T), held.T.copy()).cost


def potentials(swaps: FloatArray, cost: LoadCost, load: FloatArray) -> FloatArray:
    """Prices [E] per holder at which no swap [E, E] and no change of load pays, if there are any.

    Shortest distances in the residual graph, in as many sweeps as it has nodes. At an optimum
    these settle, and the prices prove it; elsewhere they prove what they can.
    """
    distance = _distances(_with_root(swaps, cost, load))
    prices: FloatArray = distance[-1] - distance[:-1]
    return prices


class _Graph:
    """Cheapest swaps between experts: `cost[e, f]` and the client that `best[e, f]` offers it."""

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
        """Carries out each step's cheapest swap for up to `units` clients; returns for how many.

        All swaps of a step cost the same. No client is in the way of itself: on a path every
        expert is given once and taken once at the most.
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
        """The clients for whom swapping e for f costs least."""
        holders = np.flatnonzero(self.held[e] & ~self.held[f])
        loss = self.fitness[e].take(holders) - self.fitness[f].take(holders)
        return holders[loss == self.cost[e, f]]

    def _refresh(self, moved: IntArray, steps: list[tuple[int, int]]) -> None:
        """Brings swaps up to date after the clients `moved` took these steps."""
        self._moved[moved] = True
        # The last place is for arcs that nobody offers.
        stale = self._moved[self.best]
        self._moved[moved] = False
        for row in np.flatnonzero(stale.any(axis=1)).tolist():
            self._rescan(row, np.flatnonzero(stale[row]))
        fitness, held = self.fitness[:, moved], self.held[:, moved]
        for e, f in steps:
            # Who took f can give it for anything now, and who gave e can take it for anything.
            self._offer(moved, f, slice(None), fitness[f] - fitness, held[f] & ~held)
            self._offer(moved, slice(None), e, fitness - fitness[e], held & ~held[e])

    def _offer(
        self, moved: IntArray, e: int | slice, f: int | slice, loss: FloatArray, can: BoolArray
    ) -> None:
        """Takes note of what the clients `moved` lose by swaps [E] from e or to f: loss [E, n]."""
        loss = np.where(can, loss, np.inf)
        lowest = loss.argmin(axis=1)
        least = loss[np.arange(loss.shape[0]), lowest]
        better = least < self.cost[e, f]
        self.cost[e, f] = np.where(better, least, self.cost[e, f])
        self.best[e, f] = np.where(better, moved[lowest], self.best[e, f])

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


def _with_root(swaps: FloatArray, cost: LoadCost, load: FloatArray) -> FloatArray:
    """Swap costs [E, E] plus a root: e -> root raises the load of e, root -> f lowers that of f."""
    experts = load.shape[0]
    arcs = np.full((experts + 1, experts + 1), np.inf)
    arcs[:experts, :experts] = swaps
    arcs[:experts, experts] = cost.rise(load)
    arcs[experts, :experts] = np.where(load > 0, -cost.rise(load - 1), np.inf)
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
