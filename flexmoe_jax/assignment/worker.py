"""Processes that run OR-Tools for `flow.py`, and what is believed of their answers.

Whoever asks has a process to itself: it is taken from the idle ones, or started, and put back when
it has answered. So threads, and signal handlers that solve, never meet in one pipe. Every question
has a number, which the answer repeats; whatever else happens during an exchange, an interruption
among it, the process is done away with, since what its pipe holds then, nobody knows. A forked
process lets go of its parent's workers and starts its own.

A worker's end of its pipes closes with the process that started it, however that ended: then it
ends, too (`flow_worker.py`).
"""

from __future__ import annotations

import atexit
import itertools
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexmoe_jax.assignment.problem import BoolArray, SolverError, seconds_left

_Int = npt.NDArray[np.int64]

_SCRIPT = Path(__file__).with_name("flow_worker.py")
# Idle workers that are kept, since no more can work at once; workers that any number of threads
# share, of 60 MB each; and seconds to wait for one until there may be one more all the same.
_KEPT = os.cpu_count() or 1
_MOST, _PATIENCE = max(8, _KEPT), 5.0
# A worker that was killed from outside says nothing of the question.
_ATTEMPTS = 2


class _LostError(Exception):
    """The worker is gone, or was never there."""


def ask(cost: _Int, *numbers: _Int, deadline: float) -> BoolArray:
    """The minimum-cost flow of a question; `flow_worker.solve` says what its arrays are.

    Args:
      cost: [C, E].
      *numbers: capacities, least and greatest loads, and penalties.
      deadline: on the clock of `time.perf_counter`.

    Returns:
      [C, E] bool.

    Raises:
      SolverError: there is no answer, or not to this question, or the deadline passed.
    """
    reason = ""
    for _ in range(_ATTEMPTS):
        seconds_left(deadline)
        try:
            with _lent() as worker:
                return worker.solve(cost, *numbers, deadline=deadline)
        except _LostError as error:
            reason = str(error)
    seconds_left(deadline)
    raise SolverError(f"OR-Tools' process ended; its message stands above{reason}")


class _Worker:
    """OR-Tools in a process of its own."""

    def __init__(self) -> None:
        # In a group of its own, so that a Ctrl-C is for us alone. The pipes are not buffered: a
        # forked process could not let go of half a question without sending it.
        group: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                **group,
            )
        # RuntimeError: the interpreter is shutting down.
        except (OSError, RuntimeError) as error:
            raise _LostError(f": {error}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self.owner = os.getpid()
        _STARTED[id(self)] = self

    def solve(self, cost: _Int, *numbers: _Int, deadline: float) -> BoolArray:
        with self._ended_by(deadline):
            number = next(_NUMBERS)
            self._write(np.array([number, *cost.shape], np.int64))
            for array in (cost, *numbers):
                self._write(array)
            answered, *shape = np.frombuffer(self._read(24), np.int64).tolist()
            if answered != number or shape not in ([0, 0], list(cost.shape)):
                raise SolverError("OR-Tools' process answered another question")
            if shape == [0, 0]:
                raise SolverError("OR-Tools found no flow")
            found = np.frombuffer(self._read(cost.size), np.uint8).reshape(cost.shape)
        if (found > 1).any():
            raise SolverError("OR-Tools' flow is not of whole clients")
        return np.asarray(found == 1)

    @contextmanager
    def _ended_by(self, deadline: float) -> Iterator[None]:
        """OR-Tools takes no time limit; its end unblocks the pipes."""
        left = seconds_left(deadline)
        if left > threading.TIMEOUT_MAX:
            yield
            return
        timer = threading.Timer(left, self._process.kill)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError as error:
            raise _LostError(f": {error}") from error
        try:
            yield
        finally:
            timer.cancel()

    def _write(self, array: _Int) -> None:
        rest = memoryview(array.tobytes())
        try:
            while rest:
                rest = rest[self._requests.write(rest) :]
        # ValueError: a forked process let go of it.
        except (OSError, ValueError) as error:
            raise _LostError("") from error

    def _read(self, size: int) -> bytearray:
        found = bytearray(size)
        rest = memoryview(found)
        try:
            while rest:
                part = self._answers.read(len(rest))
                if not part:
                    raise _LostError("")
                rest[: len(part)] = part
                rest = rest[len(part) :]
        except (OSError, ValueError) as error:
            raise _LostError("") from error
        return found

    def close(self) -> None:
        """Ends the process."""
        _STARTED.pop(id(self), None)
        self._process.kill()
        self._let_go()
        self._process.wait()

    def abandon(self) -> None:
        """In a forked process: the worker is another process' child."""
        self._let_go()
        # Popen would ask after it otherwise.
        self._process.returncode = 0

    def _let_go(self) -> None:
        for pipe in (self._requests, self._answers):
            with suppress(OSError):
                pipe.close()


_NUMBERS = itertools.count()
_IDLE: deque[_Worker] = deque()
_STARTED: dict[int, _Worker] = {}


@contextmanager
def _lent() -> Iterator[_Worker]:
    """A worker that nobody else has; it is put back only if nothing was raised."""
    worker = _idle()
    end = time.perf_counter() + _PATIENCE
    while worker is None and len(_STARTED) >= _MOST and time.perf_counter() < end:
        time.sleep(0.001)
        worker = _idle()
    worker = worker or _Worker()
    try:
        yield worker
    except BaseException:
        worker.close()
        raise
    if len(_IDLE) < _KEPT:
        _IDLE.append(worker)
    else:
        worker.close()


def _idle() -> _Worker | None:
    while True:
        try:
            worker = _IDLE.pop()
        except IndexError:
            return None
        if worker.owner == os.getpid():
            return worker
        # A fork that Python was not told of.
        worker.abandon()


def _close_all() -> None:
    _IDLE.clear()
    for worker in list(_STARTED.values()):
        worker.close()


def _abandon_all() -> None:
    _IDLE.clear()
    for worker in list(_STARTED.values()):
        worker.abandon()
    _STARTED.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
