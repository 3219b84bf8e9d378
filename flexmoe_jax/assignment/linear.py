"""Linear programs in HiGHS' own form, for those that every round solves.

Where a program is nothing but rows of sums, writing it down through CVXPY takes longer than solving
it, and loading CVXPY longer than all else that a launch does on the host.

    maximise Σ worth_j x_j   over 0 ≤ x ≤ 1,   low_i ≤ Σ_{j in row i} value_j x_j ≤ high_i
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from flexmoe_jax.assignment.loading import load
from flexmoe_jax.assignment.problem import FloatArray, IntArray, SolverError, seconds_left

# Tight enough that fitness values 1e-8 apart are told apart.
HIGHS_OPTIONS = {
    "dual_feasibility_tolerance": 1e-9,
    "primal_feasibility_tolerance": 1e-9,
    "parallel": "off",
    "threads": 1,
}
# Variables up to which HiGHS is faster without presolve.
FEW_VARIABLES = 4096


class Rows(NamedTuple):
    """A group of rows in which every variable stands once.

    Attributes:
      row: (n,) of each variable, in 0 .. m - 1.
      value: (n,) of each variable there, or one for all.
      low: (m,) least sum of each row.
      high: (m,) greatest.
    """

    row: IntArray
    value: FloatArray | float
    low: FloatArray | IntArray
    high: FloatArray | IntArray


class Optimum(NamedTuple):
    """What a linear program's optimum is.

    Attributes:
      x: (n,) a vertex, up to rounding.
      value: of the program.
      prices: for each group, (m,): by how much `value` grows with a binding bound of each row.
    """

    x: FloatArray
    value: float
    prices: tuple[FloatArray, ...]


def maximise(worth: FloatArray, *groups: Rows, deadline: float = np.inf) -> Optimum | None:
    """Solves a linear program by the simplex method, from scratch.

    Args:
      worth: (n,) of each variable.
      *groups: rows, each group with its own.
      deadline: on the clock of `time.perf_counter`.

    Returns:
      The optimum, or None where there is none, because the rows contradict each other.

    Raises:
      SolverError: HiGHS failed, or the deadline passed.
    """
    highspy = quiet_highspy()
    count, entries = worth.size, len(groups)
    ends = np.cumsum([0, *(len(group.low) for group in groups)])
    index = np.empty((count, entries), np.int32)
    value = np.empty((count, entries))
    for place, group in enumerate(groups):
        index[:, place] = ends[place] + group.row
        value[:, place] = group.value
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = count, int(ends[-1])
    program.sense_ = highspy.ObjSense.kMaximize
    program.col_cost_ = np.asarray(worth, np.float64)
    program.col_lower_, program.col_upper_ = np.zeros(count), np.ones(count)
    program.row_lower_ = np.concatenate([group.low for group in groups]).astype(np.float64)
    program.row_upper_ = np.concatenate([group.high for group in groups]).astype(np.float64)
    program.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    program.a_matrix_.start_ = np.arange(0, count * entries + 1, entries, dtype=np.int32)
    program.a_matrix_.index_, program.a_matrix_.value_ = index.ravel(), value.ravel()

    solver = highspy.Highs()
    options: dict[str, Any] = {"output_flag": False, "solver": "simplex", **HIGHS_OPTIONS}
    if count <= FEW_VARIABLES:
        options["presolve"] = "off"
    if (left := seconds_left(deadline)) < np.inf:
        options["time_limit"] = left
    for name, option in options.items():
        solver.setOptionValue(name, option)
    solver.passModel(program)
    with one_thread():
        solver.run()
    status = solver.getModelStatus()
    # Nothing here is unbounded.
    if status in (
        highspy.HighsModelStatus.kInfeasible,
        highspy.HighsModelStatus.kUnboundedOrInfeasible,
    ):
        return None
    if status != highspy.HighsModelStatus.kOptimal:
        seconds_left(deadline)
        raise SolverError(f"HiGHS ended with status {solver.modelStatusToString(status)}")
    solution = solver.getSolution()
    return Optimum(
        np.asarray(solution.col_value),
        float(solver.getInfo().objective_function_value),
        tuple(np.split(np.asarray(solution.row_dual), ends[1:-1])),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets HiGHS run in the calling thread alone, and leaves no thread of it behind.

    A process forked off while some are left aborts when it ends. Nor can HiGHS have one thread
    while somebody else's linger, or they another number while ours does.
    """
    highs = quiet_highspy().Highs
    highs.resetGlobalScheduler(True)
    try:
        yield
    finally:
        highs.resetGlobalScheduler(True)


@lru_cache(maxsize=1)
def quiet_highspy() -> Any:
    """HiGHS, without types, loaded when it is first needed, and without a word on stdout.

    From 1.16 on it says its name and licence when the first object of a process is made, whoever
    makes it and before any option can be set. So the first one is made here, with an option set
    half way.
    """
    highspy = load("highspy")

    class Quiet(highspy.Highs):  # type: ignore[misc, name-defined]
        def enableCallbacks(self) -> None:  # noqa: N802
            self.setOptionValue("log_to_console", False)
            super().enableCallbacks()

    Quiet()
    return highspy
