"""Worker processes that run OR-Tools for `flow.py`, and checks of their answers.

A caller has exclusive use of a worker: it takes an idle one or starts one, and returns it after the
answer. So threads, and signal handlers that solve, never share a pipe. Every request has a number,
which the answer repeats. After any error or interruption during a request, the worker is
terminated, because the content of its pipe is then unknown. A forked process closes its copies of
its parent's pipes and starts its own workers.

When the process that started a worker ends, for any reason, the worker's pipes close. The worker
then ends, too (`flow_worker.py`).
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
# Maximum number of idle workers: more cannot run in parallel. Maximum number of workers for any
# number of threads (60 MB each), and seconds to wait for an idle one before exceeding that maximum.
_KEPT = os.cpu_count() or 1
_MOST, _PATIENCE = max(8, _KEPT), 5.0
# If a worker was killed from outside, the request itself may be fine, so try again.
_ATTEMPTS = 2


class _LostError(Exception):
    """The worker has ended, or could not be started."""


def ask(cost: _Int, *numbers: _Int, deadline: float) -> BoolArray:
    """Computes a minimum-cost flow in a worker; `flow_worker.solve` describes the arrays.

    Args:
      cost: [C, E].
      *numbers: capacities, minimum loads, maximum loads, and penalties.
      deadline: on the `time.perf_counter` clock.

    Returns:
      [C, E] bool.

    Raises:
      SolverError: there is no answer, or it belongs to another request, or the deadline passed.
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
    """A separate process that runs OR-Tools."""

    def __init__(self) -> None:
        # A separate process group, so that Ctrl-C reaches only the main process. The pipes are not
        # buffered: otherwise a forked process that closes its copy would send half a request.
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
        """Kills the worker at the deadline; this unblocks the pipes. OR-Tools has no time limit."""
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
        # ValueError: a forked process closed the pipe.
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
        """Closes the pipes in a forked process, where the worker is another process's child."""
        self._let_go()
        # Otherwise Popen would poll the worker.
        self._process.returncode = 0

    def _let_go(self) -> None:
        for pipe in (self._requests, self._answers):
            with suppress(OSError):
                pipe.close()


_NUMBERS = itertools.count()
_IDLE: deque[_Worker] = deque()
_STARTED: dict[int, _Worker] = {}
# Only tried, never waited for: a signal handler may interrupt the thread that holds it.
_STARTING = threading.Lock()


@contextmanager
def _lent() -> Iterator[_Worker]:
    """Lends a worker for exclusive use; it is put back only if no exception was raised."""
    end = time.perf_counter() + _PATIENCE
    while (worker := _idle() or _start()) is None and time.perf_counter() < end:
        time.sleep(0.001)
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
        # The process was forked without Python's fork hooks.
        worker.abandon()


def _start() -> _Worker | None:
    """Starts a worker, unless there are enough or another thread is starting one."""
    if not _STARTING.acquire(blocking=False):
        return None
    try:
        return _Worker() if len(_STARTED) < _MOST else None
    finally:
        _STARTING.release()


def _close_all() -> None:
    _IDLE.clear()
    for worker in list(_STARTED.values()):
        worker.close()


def _abandon_all() -> None:
    global _STARTING
    _STARTING = threading.Lock()
    _IDLE.clear()
    for worker in list(_STARTED.values()):
        worker.abandon()
    _STARTED.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
