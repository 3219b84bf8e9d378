"""Benchmarks: `python -m experiments.bench SUITE` prints one JSON object a line.

Suites: `assignment` (a line per solver, clients C, experts E and load model: seconds warm, the
best and the worst of three problems, seconds cold, peak memory and gap). Each line is measured in
a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flexmoe_jax.assignment import Problem, load_bounds, solve
from flexmoe_jax.errors import InputError

ASSIGNMENT = (
    ("relaxation", 100, 8, "clients"),
    ("relaxation", 1_000, 64, "clients"),
    ("auto", 1_000, 64, "clients"),
    ("auto", 1_000, 64, "samples"),
    ("auto", 10_000, 64, "clients"),
    ("auto", 10_000, 64, "samples"),
    ("auto", 10_000, 64, "usage"),
    ("flow", 10_000, 64, "clients"),
    ("dual", 10_000, 64, "clients"),
    ("auto", 100_000, 8, "clients"),
    ("auto", 100_000, 64, "clients"),
)


def main(arguments: list[str]) -> int:
    """Runs the suite that the command line names; returns the exit code."""
    try:
        if len(arguments) == 5 and arguments[0] == "assignment":
            _, solver, clients, experts, load = arguments
            print(json.dumps(measure(solver, int(clients), int(experts), load)))
            return 0
        if len(arguments) != 1 or arguments[0] not in SUITES:
            raise InputError("suite", " ".join(arguments), f"give one of {', '.join(SUITES)}")
        for line in SUITES[arguments[0]]():
            print(line, flush=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def assignment_lines() -> Iterator[str]:
    """A line for each case of `ASSIGNMENT`."""
    for case in ASSIGNMENT:
        command = [sys.executable, "-m", "experiments.bench", "assignment", *map(str, case)]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        yield ended.stdout.strip()


def measure(solver: str, clients: int, experts: int, load: str) -> dict[str, Any]:
    """Solves four problems of a size, the first of them cold."""
    before = _peak_bytes()
    answers = [solve(draw(seed, clients, experts, load), solver) for seed in range(4)]
    warm = [answer.seconds for answer in answers[1:]]
    return {
        "suite": "assignment",
        "solver": solver,
        "clients": clients,
        "experts": experts,
        "load": load,
        "seconds": min(warm),
        "seconds_worst": max(warm),
        "seconds_cold": answers[0].seconds,
        "peak_bytes": _peak_bytes(),
        "peak_bytes_per_pair": (_peak_bytes() - before) / (clients * experts),
        "gap_worst": max(answer.gap for answer in answers),
        "violation_worst": max(float(answer.violation.max()) for answer in answers),
        "status": answers[-1].status,
    }


def draw(seed: int, clients: int, experts: int, load: str) -> Problem:
    """A problem in which ten kinds of clients compete for the same experts."""
    rng = np.random.default_rng([seed, clients, experts])
    kind = rng.integers(0, 10, clients)
    noise = 0.05 * rng.normal(size=(clients, experts))
    fitness = np.clip(rng.random((10, experts))[kind] + noise, 0, 1)
    capacity = rng.integers(1, 5, clients)
    weight: float | np.ndarray[Any, np.dtype[np.float64]] = 1.0
    if load == "samples":
        weight = rng.integers(20, 200, clients).astype(np.float64)
    elif load == "usage":
        weight = rng.gamma(2.0, 20.0, (clients, experts))
    low, high = load_bounds(capacity, np.zeros(experts), load_weight=weight)
    return Problem(fitness, capacity, low, high, weight)


def _peak_bytes() -> int:
    # Linux counts kilobytes, macOS bytes.
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return peak if sys.platform == "darwin" else 1024 * peak


SUITES: dict[str, Callable[[], Iterator[str]]] = {"assignment": assignment_lines}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
