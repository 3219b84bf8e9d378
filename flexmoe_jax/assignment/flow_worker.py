"""The process that runs OR-Tools for `worker.py`; a script that needs only NumPy and OR-Tools.

Reads requests from standard input until it ends. A request is a number, C and E, then costs [C, E],
capacities [C], and minimum loads, maximum loads and penalties [E], all 64-bit integers. For each
request it writes to standard output the number, the shape of the answer, and the answer, one byte
per pair.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from ortools.graph.python import min_cost_flow

Int = npt.NDArray[np.int64]


def solve(cost: Int, capacity: Int, low: Int, high: Int, penalty: Int) -> Int:
    """Computes the minimum-cost flow of clients' capacities [C] through pairs of cost [C, E].

    Loads below `low` [E] or above `high` [E] cost `penalty` [E] per unit. Returns [C, E] of 0 and
    1, or an empty array if OR-Tools fails.
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
    # The first `low` units of a load earn the penalty back; the units up to `high` are free.
    for width, price in (
        (low, -penalty),
        (high - low, np.zeros_like(penalty)),
        (np.full(experts, total), penalty),
    ):
        flow.add_arcs_with_capacity_and_unit_cost(nodes, sink, width, price)
    flow.set_nodes_supplies(np.arange(clients), capacity)
    flow.set_nodes_supplies(sink[:1], np.array([-total]))
    if flow.solve() != flow.OPTIMAL:
        return np.zeros((0, 0), np.int64)
    return np.asarray(flow.flows(np.arange(pairs))).reshape(clients, experts)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests one after the other."""

    def read(*size: int) -> Int:
        numbers = requests.read(8 * int(np.prod(size)))
        if len(numbers) < 8 * int(np.prod(size)):
            raise BrokenPipeError("whoever asked is gone")
        return np.frombuffer(numbers, np.int64).reshape(size)

    while head := requests.read(24):
        number, clients, experts = np.frombuffer(head, np.int64).tolist()
        question = (
            read(clients, experts),
            read(clients),
            read(experts),
            read(experts),
            read(experts),
        )
        end_with_parent(requests, True)
        found = solve(*question)
        end_with_parent(requests, False)
        answers.write(np.array([number, *found.shape], np.int64).tobytes())
        answers.write(found.astype(np.uint8).tobytes())
        answers.flush()


def end_with_parent(requests: BinaryIO, wanted: bool) -> None:
    """Sets whether this process ends as soon as the requests end, even while OR-Tools runs.

    While OR-Tools runs, the pipe can only be closed: no request comes before the answer. On Linux
    the kernel then sends a signal, and a process that does not handle it ends. On other systems,
    OR-Tools finishes first.
    """
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(requests, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(requests, fcntl.F_GETFL)
        wish = flags | fcntl.FASYNC if wanted else flags & ~fcntl.FASYNC
        fcntl.fcntl(requests, fcntl.F_SETFL, wish)


if __name__ == "__main__":
    # Output that libraries print must not mix with the answers; standard error may be closed.
    answers = os.fdopen(os.dup(1), "wb")
    with suppress(OSError):
        os.dup2(2, 1)
    # The parent process may end at any time.
    with suppress(BrokenPipeError):
        serve(sys.stdin.buffer, answers)
    os._exit(0)
