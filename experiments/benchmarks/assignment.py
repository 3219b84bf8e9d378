"""Suite `assignment`: solvers by problem size.

One line per solver, clients C, experts E and load model: warm seconds (the best and the worst of
three problems), cold seconds, peak memory and gap. Load `equal` is `clients` with equal fitness
everywhere, as before the first round. `dual` is a JAX program: as in the launchers, its compiled
programs are kept on disk. A second process, which finds them there, is measured. The peak memory of
the first process, compilation included, is `peak_bytes_compiling`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.benchmarks.process import Figures, peak_bytes, run_case
from flexmoe_jax.assignment import Problem, load_bounds, solve
from flexmoe_jax.errors import InputError

LOADS = ("clients", "samples", "usage", "equal")
CASES = (
    ("relaxation", 100, 8, "clients"),
    ("relaxation", 1_000, 64, "clients"),
    ("auto", 1_000, 64, "clients"),
    ("auto", 1_000, 64, "samples"),
    ("auto", 10_000, 64, "clients"),
    ("auto", 10_000, 64, "equal"),
    ("auto", 10_000, 64, "samples"),
    ("auto", 10_000, 64, "usage"),
    ("flow", 10_000, 64, "clients"),
    ("dual", 10_000, 64, "clients"),
    ("auto", 100_000, 8, "clients"),
    ("auto", 100_000, 64, "clients"),
)


def run(words: list[str]) -> Iterator[Figures]:
    """Yields the figures of each case in `CASES`, or of one case given by four words.

    Raises:
      InputError: the words name no case.
    """
    match words:
        case []:
            for case in CASES:
                yield run_case("assignment", *case) if case[0] != "dual" else _run_twice(*case)
        case [solver, clients, experts, load] if load in LOADS and all(
            n.isdecimal() and int(n) for n in (clients, experts)
        ):
            yield measure(solver, int(clients), int(experts), load)
        case _:
            remedy = f"give SOLVER CLIENTS EXPERTS LOAD, or none; LOAD is {', '.join(LOADS)}"
            raise InputError("assignment", " ".join(words), remedy)


def _run_twice(*case: object) -> Figures:
    with tempfile.TemporaryDirectory() as programs:
        kept = {
            "JAX_COMPILATION_CACHE_DIR": programs,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        first = run_case("assignment", *case, **kept)
        second = run_case("assignment", *case, **kept)
    return second | {"peak_bytes_compiling": first["peak_bytes"]}


def measure(solver: str, clients: int, experts: int, load: str) -> Figures:
    """Solves four problems of one size, the first of them cold."""
    before = peak_bytes()
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
        "peak_bytes": peak_bytes(),
        "peak_bytes_per_pair": (peak_bytes() - before) / (clients * experts),
        "gap_worst": max(answer.gap for answer in answers),
        "violation_worst": max(float(answer.violation.max()) for answer in answers),
        "status": answers[-1].status,
    }


def draw(seed: int, clients: int, experts: int, load: str) -> Problem:
    """Draws a problem in which ten kinds of clients compete for the same experts."""
    rng = np.random.default_rng([seed, clients, experts])
    kind = rng.integers(0, 10, clients)
    noise = 0.05 * rng.normal(size=(clients, experts))
    fitness = np.clip(rng.random((10, experts))[kind] + noise, 0, 1)
    if load == "equal":
        fitness = np.full(fitness.shape, 0.5)
    capacity = rng.integers(1, 5, clients)
    weight: float | np.ndarray[Any, np.dtype[np.float64]] = 1.0
    if load == "samples":
        weight = rng.integers(20, 200, clients).astype(np.float64)
    elif load == "usage":
        weight = rng.gamma(2.0, 20.0, (clients, experts))
    low, high = load_bounds(capacity, np.zeros(experts), load_weight=weight)
    return Problem(fitness, capacity, low, high, weight)
