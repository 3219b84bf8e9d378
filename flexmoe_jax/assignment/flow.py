"""Exact assignments under equal weights by OR-Tools' minimum-cost flow.

    source -> client (supply k_c) -> expert (one arc a pair, capacity 1, cost -Q) -> sink

with load bounds on the arcs to the sink, and dear arcs beside them for loads out of bounds. Costs
are whole numbers: fitness is scaled by the largest factor that keeps the solver's sums within 64
bits, and rounding moves the value by at most half a step a held pair, which the bound includes.

Needs the extra `flow` (OR-Tools), which runs in a process of its own: its copy of HiGHS and the
one that CVXPY uses carry the same library name, so one process can load only one of them.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

import atexit
import importlib.util
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from flexmoe_jax.assignment.certificate import effective_bounds
from flexmoe_jax.assignment.problem import BoolArray, Problem, SolverError, seconds_left
from flexmoe_jax.errors import InputError

# Costs times nodes must stay within 64 bits.
_LARGEST_SUM = 2.0**60
_FINEST = 2.0**40


def require_ortools() -> None:
    """Raises `InputError` where OR-Tools is not installed."""
    if importlib.util.find_spec("ortools") is None:
        raise InputError(
            "assignment.solver", "flow", "needs OR-Tools: pip install 'flexmoe_jax[flow]'"
        )


def solve_flow(problem: Problem, deadline: float = np.inf) -> tuple[BoolArray, float, bool]:
    """Solves a problem whose pairs all have one weight.

    Args:
      problem: what to solve.
      deadline: on the clock of `time.perf_counter`.

    Returns:
      The assignment [C, E] bool, an upper bound on its value (with the error of scaling), and
      whether load bounds had to give way.

    Raises:
      InputError: OR-Tools is not installed.
      SolverError: OR-Tools failed, or the deadline passed.
    """
    require_ortools()
    unit = problem.unit
    assert unit is not None
    clients, experts = problem.fitness.shape
    total = int(problem.capacity.sum())
    ends = effective_bounds(problem) if unit else (np.zeros(experts), np.full(experts, np.inf))
    low, high = (np.rint(np.clip(end / (unit or 1.0), 0, total)).astype(np.int64) for end in ends)
    if total == 0:
        return np.zeros((clients, experts), bool), 0.0, bool(low.any())
    centred = problem.fitness - problem.fitness.mean(axis=1, keepdims=True)
    span = float(np.max(np.abs(centred))) or 1.0
    weight = np.asarray(problem.violation_weight) / np.min(problem.violation_weight)
    # One unit of violation outweighs any path of swaps, of which each costs at most 2 spans.
    dear = 2.0 * (experts + 1)
    room = _LARGEST_SUM / ((clients + experts + 2) * 2 * dear * float(weight.max()))
    scale = min(_FINEST, room) / span
    held = _worker().solve(
        np.rint(-centred * scale).astype(np.int64),
        problem.capacity.astype(np.int64),
        low,
        high,
        np.rint(dear * span * scale * weight).astype(np.int64),
        deadline=deadline,
    )
    value = float(np.sum(problem.fitness, where=held))
    load = held.sum(axis=0)
    relaxed = bool((load < low).any() or (load > high).any())
    return held, value + total / scale + 1e-12 * abs(value), relaxed


class _Worker:
    """OR-Tools in a process of its own, started once."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("flow_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        atexit.register(self.close)

    def solve(self, *numbers: np.ndarray, deadline: float) -> BoolArray:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        patience = min(seconds_left(deadline), threading.TIMEOUT_MAX)
        # OR-Tools takes no time limit; its end unblocks the pipes.
        timer = threading.Timer(patience, self._process.kill)
        timer.start()
        try:
            requests.write(np.array(numbers[0].shape, np.int64).tobytes())
            for array in numbers:
                requests.write(array.tobytes())
            requests.flush()
            shape = np.frombuffer(answers.read(16), np.int64)
            found = np.frombuffer(answers.read(int(np.prod(shape))), np.int8).reshape(shape)
        except (BrokenPipeError, ValueError) as error:
            _worker.cache_clear()
            atexit.unregister(self.close)
            self.close()
            seconds_left(deadline)
            raise SolverError("OR-Tools' process ended; its message stands above") from error
        finally:
            timer.cancel()
        if found.shape != numbers[0].shape:
            raise SolverError("OR-Tools found no flow")
        return np.asarray(found > 0)

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()


@lru_cache(maxsize=1)
def _worker() -> _Worker:
    return _Worker()
