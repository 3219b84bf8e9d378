"""Linear programs that every round solves, passed to HiGHS directly.

For a program that consists only of rows of sums, modelling it with CVXPY takes longer than solving
it, and importing CVXPY takes longer than all other host work of a launch.

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

# Tight enough to distinguish fitness values that are 1e-8 apart.
HIGHS_OPTIONS = {
    "dual_feasibility_tolerance": 1e-9,
    "primal_feasibility_tolerance": 1e-9,
    "parallel": "off",
    "threads": 1,
}
# Number of variables up to which HiGHS is faster without presolve.
FEW_VARIABLES = 4096


class Rows(NamedTuple):
    """A group of rows in which every variable occurs exactly once.

    Attributes:
      row: (n,) row of each variable, in 0 .. m - 1.
      value: (n,) coefficient of each variable in its row, or one for all.
      low: (m,) minimum sum of each row.
      high: (m,) maximum sum of each row.
    """

    row: IntArray
    value: FloatArray | float
    low: FloatArray | IntArray
    high: FloatArray | IntArray


class Optimum(NamedTuple):
    """The optimum of a linear program.

    Attributes:
      x: (n,) a vertex, up to rounding.
      value: the optimal objective value.
      prices: for each group, (m,): how fast `value` grows with the binding bound of each row.
    """

    x: FloatArray
    value: float
    prices: tuple[FloatArray, ...]


def maximise(worth: FloatArray, *groups: Rows, deadline: float = np.inf) -> Optimum | None:
    """Solves a linear program by the simplex method, from scratch.

    Args:
      worth: (n,) objective coefficient of each variable.
      *groups: groups of rows, one argument per group.
      deadline: on the `time.perf_counter` clock.

    Returns:
      The optimum, or None if the rows contradict each other.

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
    # These programs are never unbounded, so both of these mean infeasible.
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
    """Lets HiGHS run only in the calling thread, and leaves no HiGHS threads behind.

    A process that is forked while HiGHS threads exist aborts when it ends. HiGHS also cannot run
    with one thread while threads of an earlier run with another number exist, and vice versa.
    """
    highs = quiet_highspy().Highs
    highs.resetGlobalScheduler(True)
    try:
        yield
    finally:
        highs.resetGlobalScheduler(True)


@lru_cache(maxsize=1)
def quiet_highspy() -> Any:
    """Imports HiGHS (untyped) on first use, without its banner on stdout.

    From 1.16 on, HiGHS prints its name and licence when the first object of a process is created,
    before the caller can set any option. So this function creates the first object, and sets the
    option in the middle of its construction.
    """
    highspy = load("highspy")

    class Quiet(highspy.Highs):  # type: ignore[misc, name-defined]
        def enableCallbacks(self) -> None:  # noqa: N802
            self.setOptionValue("log_to_console", False)
            super().enableCallbacks()

    Quiet()
    return highspy
