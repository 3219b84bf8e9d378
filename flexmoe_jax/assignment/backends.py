"""CVXPY's solvers: which there are, what they are told, and what they answer.

CVXPY has state that all programs share, a counter of variables among it, so threads model by turns;
they solve side by side.
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

# What the backends call their time limit in seconds; others run without one.
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
    """In a forked process: whoever modelled in the other one is not here to end it."""
    global _MODELLING
    _MODELLING = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def modelling() -> Any:
    """The lock to model under.

    Raises:
      SolverError: what was interrupted to run this is modelling, and CVXPY is half way through.
    """
    if _MODELLING._is_owned():
        raise SolverError("CVXPY is at work on what was interrupted; use auto in signal handlers")
    return _MODELLING


def require_backend(backend: str) -> None:
    """Raises `InputError` for a CVXPY solver that is not installed."""
    # HiGHS always is, and CVXPY takes a while to load.
    if backend != "HIGHS" and backend not in _installed():
        raise InputError("assignment.backend", backend, f"give one of {', '.join(_installed())}")


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    return tuple(cvxpy().installed_solvers())


def cvxpy() -> Any:
    """CVXPY, loaded when it is first needed."""
    return load("cvxpy")


def run(program: Any, backend: str, deadline: float) -> bool:
    """Solves a CVXPY problem; says whether it was feasible.

    Args:
      program: the problem.
      backend: by CVXPY's name; HiGHS leaves quadratic terms to Clarabel.
      deadline: on the clock of `time.perf_counter`.

    Raises:
      InputError: the backend is not there, or does not take such problems.
      SolverError: it failed, or the deadline passed.
    """
    cp = cvxpy()
    if backend == "HIGHS" and not program.objective.expr.is_pwl():
        # HiGHS' active-set method for quadratics can cycle for ever on degenerate problems.
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
        # From scratch: of several optima a warm start finds another one after every past, and a run
        # that goes on from a checkpoint has another past.
        with one_thread() if backend == "HIGHS" else nullcontext():
            raw = chain.solve_via_data(program, data, warm_start=False, solver_opts=options)
        with modelling(), warnings.catch_warnings():
            # Inexact answers: the certificate says how good they are, and limits are errors here.
            warnings.simplefilter("ignore")
            program.unpack_results(raw, chain, inverse)
    except ImportError as error:
        raise _refused(backend, error) from error
    # CVXPY answers a status that it does not know with a ValueError.
    except (cp.SolverError, ValueError) as error:
        raise SolverError(f"{backend} failed") from error
    # `infeasible_inaccurate` and `infeasible_or_unbounded` too: nothing here is unbounded.
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
