"""The process that runs OR-Tools for `flow.py`; a script that needs NumPy and OR-Tools alone.

Reads problems from standard input until it ends: C and E, then costs [C, E], capacities [C], and
least loads, greatest loads and penalties [E], all of 64-bit whole numbers. Writes to standard
output, for each, the shape of its answer and the answer, a byte a pair.
"""

from __future__ import annotations

import sys
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from ortools.graph.python import min_cost_flow

Int = npt.NDArray[np.int64]


def solve(cost: Int, capacity: Int, low: Int, high: Int, penalty: Int) -> Int:
    """Minimum-cost flow of clients' capacities [C] through pairs of cost [C, E].

    Loads below `low` [E] or above `high` [E] cost `penalty` [E] a unit. Returns [C, E] of 0 and 1,
    or an empty array where OR-Tools fails.
    """
    clients, experts = cost.shape
    flow = min_cost_flow.SimpleMinCostFlow()
    pairs, total = clients * experts, int(capacity.sum())
    nodes = np.arange(clients, clients + experts)
    sink = np.full(experts, clients + experts)
    flow.add_arcs_with_capacity_and_unit_cost(
        np.repeat(np.arange(clients), experts),
        np.tile(nodes, clients),
        np.ones(pairs, np.int64),
        cost.ravel(),
    )
    # The first `low` units of a load are paid for, those up to `high` are free.
    for width, price in (
        (low, -penalty),
        (high - low, np.zeros_like(penalty)),
        (np.full(experts, total), penalty),
    ):
        flow.add_arcs_with_capacity_and_unit_cost(nodes, sink, width, price)
    flow.set_nodes_supplies(np.arange(clients), capacity)
    flow.set_nodes_supplies(sink[:1], np.array([-total]))
    if flow.solve() != flow.OPTIMAL:
        return np.zeros((0, experts), np.int64)
    return np.asarray(flow.flows(np.arange(pairs))).reshape(clients, experts)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers one problem after the other."""
    while shape := requests.read(16):
        clients, experts = np.frombuffer(shape, np.int64)

        def read(*size: int) -> Int:
            return np.frombuffer(requests.read(8 * int(np.prod(size))), np.int64).reshape(size)

        found = solve(
            read(clients, experts), read(clients), read(experts), read(experts), read(experts)
        )
        answers.write(np.array(found.shape, np.int64).tobytes())
        answers.write(found.astype(np.int8).tobytes())
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
