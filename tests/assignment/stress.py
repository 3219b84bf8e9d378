"""Solve under threads, interruptions and forks: each answer is right or an error, and none hangs.

`python -m tests.assignment.stress threads flow 2000` prints how many were right, wrong, errors and
hangs; so do `interrupts` and `forks`. The tests run small numbers of each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flexmoe_jax.assignment import Problem, Solution, SolverError, load_bounds, solve

SHAPES = ((40, 8), (20, 5), (300, 8), (12, 4))
PROBLEMS = 24
# Seconds after which a forked process counts as hanging.
PATIENCE = 60.0


def draw(index: int, solver: str) -> Problem:
    rng = np.random.default_rng([3, index])
    clients, experts = SHAPES[index % len(SHAPES)]
    capacity = rng.integers(1, 4, clients)
    weighted = solver != "flow" and index % 3 == 0
    weight = rng.integers(5, 40, clients).astype(float) if weighted else 1.0
    low, high = load_bounds(capacity, np.zeros(experts), load_weight=weight)
    if index % 7 == 5:
        # The bounds demand more load than there is.
        low, high = low * 1.5, high * 1.5
    return Problem(rng.random((clients, experts)), capacity, low, high, weight)


class Checker:
    """Problems and their reference solutions, which are found one at a time."""

    def __init__(self, solver: str) -> None:
        self.solver = solver
        self.problems = [draw(index, solver) for index in range(PROBLEMS)]
        self.seconds: list[float] = []
        self.expected: list[Solution] = []
        for problem in self.problems:
            solve(problem, solver)
            begin = time.perf_counter()
            self.expected.append(solve(problem, solver))
            self.seconds.append(time.perf_counter() - begin)

    def outcome(self, index: int) -> str:
        expected = self.expected[index % PROBLEMS]
        try:
            found = solve(self.problems[index % PROBLEMS], self.solver)
        except SolverError:
            return "error"
        same = abs(found.value - expected.value) <= 1e-9 * abs(expected.value)
        return "right" if same and found.status == expected.status else "wrong"


def threads(solver: str, count: int) -> Counter[str]:
    """Solves from 8 threads."""
    check = Checker(solver)
    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(check.outcome, range(count)))


def interrupts(solver: str, count: int) -> Counter[str]:
    """Solves right after `count` other solves that were interrupted at random moments."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    check, outcomes, chance = Checker(solver), Counter[str](), random.Random(0)
    signal.signal(signal.SIGALRM, interrupt)
    while outcomes["interrupted"] < count:
        index = chance.randrange(PROBLEMS)
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + chance.random() * check.seconds[index])
            outcomes[check.outcome(index)] += 1
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        except KeyboardInterrupt:
            outcomes["interrupted"] += 1
        outcomes[check.outcome(chance.randrange(PROBLEMS))] += 1
    return outcomes


def forks(solver: str, count: int) -> Counter[str]:
    """Solves in forked processes while the parent process also solves."""
    check, outcomes = Checker(solver), Counter[str]()
    # JAX, if loaded, warns about forks; this test checks itself whether a fork hangs.
    warnings.simplefilter("ignore", RuntimeWarning)
    codes = ("right", "error", "wrong")
    for index in range(count):
        child = os.fork()
        if not child:
            os._exit(codes.index(check.outcome(index)))
        outcomes[check.outcome(index + 1)] += 1
        outcomes[f"child {end_of(child, codes)}"] += 1
    return outcomes


def end_of(child: int, codes: tuple[str, ...]) -> str:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return codes[code] if 0 <= code < len(codes) else f"died of {code}"
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


KINDS: dict[str, Callable[[str, int], Counter[str]]] = {
    "threads": threads,
    "interrupts": interrupts,
    "forks": forks,
}

if __name__ == "__main__":
    kind, name, number = sys.argv[1:]
    print(json.dumps(KINDS[kind](name, int(number))))
