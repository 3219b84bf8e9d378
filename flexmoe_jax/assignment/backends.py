"""CVXPY's solvers: which are installed, their options, and how their results are read.

CVXPY has state that all programs share (a counter of variables, for example). So only one thread at
a time builds a model, but threads solve in parallel.
"""

from __future__ import annotations

import os
import threading
import warnings
from contextlib import nullcontext
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from flexmoe_jax.assignment.linear import FEW_VARIABLES, HIGHS_OPTIONS, one_thread
from flexmoe_jax.assignment.loading import load
from flexmoe_jax.assignment.problem import SolverError, seconds_left
from flexmoe_jax.errors import InputError

# Each backend's option name for the time limit in seconds; other backends run without a limit.
_TIME_LIMIT = MappingProxyType(
    {
        "CLARABEL": "time_limit",
        "GLOP": "time_limit_sec",
        "GUROBI": "TimeLimit",
        "HIGHS": "time_limit",
        "OSQP": "time_limit",
        "PDLP": "time_limit_sec",
        "SCS": "time_limit_secs",
    }
)
_MODELLING: Any = threading.RLock()


def _forget_threads() -> None:
    """Replaces the lock in a forked process, where the thread that held it does not exist."""
    global _MODELLING
    _MODELLING = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def modelling() -> Any:
    """Returns the lock that a thread must hold while it builds a CVXPY model.

    Raises:
      SolverError: this thread already holds the lock: the interrupted code is in the middle of
        building a model.
    """
    if _MODELLING._is_owned():
        raise SolverError("CVXPY is at work on what was interrupted; use auto in signal handlers")
    return _MODELLING


def require_backend(backend: str) -> None:
    """Raises `InputError` for a CVXPY solver that is not installed."""
    # HiGHS is always installed, and importing CVXPY takes a while.
    if backend != "HIGHS" and backend not in _installed():
        raise InputError("assignment.backend", backend, f"give one of {', '.join(_installed())}")


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    return tuple(cvxpy().installed_solvers())


def cvxpy() -> Any:
    """Imports CVXPY on first use."""
    return load("cvxpy")


def run(program: Any, backend: str, deadline: float) -> bool:
    """Solves a CVXPY problem; returns whether it is feasible.

    Args:
      program: the problem.
      backend: CVXPY's name of the solver; Clarabel replaces HiGHS for quadratic terms.
      deadline: on the `time.perf_counter` clock.

    Raises:
      InputError: the backend is not installed, or does not support such problems.
      SolverError: the backend failed, or the deadline passed.
    """
    cp = cvxpy()
    if backend == "HIGHS" and not program.objective.expr.is_pwl():
        # HiGHS's active-set method for quadratics can cycle forever on degenerate problems.
        backend = "CLARABEL"
    options: dict[str, Any] = {}
    if backend == "HIGHS":
        options = dict(HIGHS_OPTIONS)
        if program.size_metrics.num_scalar_variables <= FEW_VARIABLES:
            options["presolve"] = "off"
    try:
        with modelling():
            data, chain, inverse = program.get_problem_data(backend, solver_opts=options)
    except (cp.SolverError, ImportError) as error:
        raise _refused(backend, error) from error
    left = seconds_left(deadline)
    if left < np.inf and backend in _TIME_LIMIT:
        options[_TIME_LIMIT[backend]] = left
    try:
        # No warm start: with several optima, the one found would depend on earlier solves. A run
        # resumed from a checkpoint has other earlier solves, so its results would differ.
        with one_thread() if backend == "HIGHS" else nullcontext():
            raw = chain.solve_via_data(program, data, warm_start=False, solver_opts=options)
        with modelling(), warnings.catch_warnings():
            # Ignore warnings of inexact answers: the certificate shows their accuracy. A limit that
            # is reached raises an error below.
            warnings.simplefilter("ignore")
            program.unpack_results(raw, chain, inverse)
    except ImportError as error:
        raise _refused(backend, error) from error
    # CVXPY raises a ValueError for a status that it does not know.
    except (cp.SolverError, ValueError) as error:
        raise SolverError(f"{backend} failed") from error
    # Includes `infeasible_inaccurate` and `infeasible_or_unbounded`: no program is unbounded.
    if program.status.startswith(cp.INFEASIBLE):
        return False
    if program.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        seconds_left(deadline)
        raise SolverError(f"{backend} ended with status {program.status}")
    return True


def _refused(backend: str, error: Exception) -> InputError:
    reason = str(error).splitlines()[0]
    others = ", ".join(name for name in _installed() if name != backend)
    return InputError("assignment.backend", backend, f"{reason} Try {others}")
