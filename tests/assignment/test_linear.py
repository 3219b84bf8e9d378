from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from flexmoe_jax.assignment import Problem, SolverError, solve
from flexmoe_jax.assignment.linear import Rows, maximise
from flexmoe_jax.assignment.relaxation import solve_relaxation


def test_a_program_solved_by_hand():
    # max 3a + 2b + c, a + b + c = 2, and 2a + b at most 2: at a = ½, b = 1, c = ½ it is worth 4.
    one_row = np.zeros(3, np.int64)
    found = maximise(
        np.array([3.0, 2.0, 1.0]),
        Rows(one_row, 1.0, np.array([2]), np.array([2])),
        Rows(np.array([0, 0, 1]), np.array([2.0, 1.0, 1.0]), np.array([0, 0]), np.array([2, 9])),
    )
    assert found is not None
    assert found.x == pytest.approx([0.5, 1.0, 0.5])
    assert found.value == pytest.approx(4.0)
    # One more in all is one more c; one more in the second row is half an a in place of half a c.
    assert found.prices[0] == pytest.approx([1.0])
    assert found.prices[1] == pytest.approx([1.0, 0.0])


def test_rows_that_contradict_each_other_have_no_optimum():
    rows = [Rows(np.zeros(2, np.int64), 1.0, np.array([n]), np.array([n])) for n in (1, 2)]
    assert maximise(np.ones(2), *rows) is None


def test_time_that_is_up_is_an_error():
    row = Rows(np.zeros(2, np.int64), 1.0, np.array([1]), np.array([1]))
    with pytest.raises(SolverError, match="time limit"):
        maximise(np.ones(2), row, deadline=time.perf_counter() - 1.0)


@pytest.mark.parametrize("shape", [(20, 8), (60, 80)])
def test_it_is_what_cvxpy_makes_of_the_relaxation(shape):
    # The second has more pairs than HiGHS is given without presolve.
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.5, 2.0, shape)
    capacity = rng.integers(1, 5, shape[0])
    share = float((weight * capacity[:, None]).mean(axis=1).sum()) / shape[1]
    fitness = -5.0 + 10.0 * rng.random(shape)
    problem = Problem(fitness, capacity, 0.8 * share, 1.2 * share, weight)
    direct, modelled = (solve_relaxation(problem, direct=flag) for flag in (True, False))
    assert direct.x == pytest.approx(modelled.x, abs=1e-9)
    assert direct.prices.load == pytest.approx(modelled.prices.load, abs=1e-9)


def test_bounds_that_cannot_hold_give_way_as_through_cvxpy():
    # 3 holders who weigh 1, 2 and 3, and room for 1 on each of 2 experts: 4 too many at least.
    problem = Problem(np.eye(3, 2), 1, 0, 1, np.array([1.0, 2.0, 3.0]))
    found = solve(problem, "auto")
    assert found.status == "relaxed"
    assert found.violation.sum() == pytest.approx(4.0)


def test_weighted_rounds_load_neither_cvxpy_nor_scipy():
    code = (
        "import sys, numpy as np\n"
        "from flexmoe_jax.assignment import Problem, solve\n"
        "rng = np.random.default_rng(0)\n"
        "found = solve(Problem(rng.random((20, 8)), 2, 3, 9, rng.uniform(0.5, 2, 20)), 'auto')\n"
        "assert found.status in ('optimal', 'feasible', 'violated')\n"
        "print([name for name in ('cvxpy', 'scipy', 'jax') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("solver", ["auto", "relaxation"])
def test_bounds_a_million_million_times_out_of_reach_take_no_longer(solver):
    found = solve(Problem(np.eye(3), 1, 1e9, 1e9, 1e-6), solver, time_limit=20.0)
    assert found.status == "relaxed"
    assert found.value == 3.0


# What HiGHS 1.16 does, and 1.15 does not: its name and licence with the first object of a process.
LOUD = (
    "import highspy\n"
    "quiet = highspy.Highs.enableCallbacks\n"
    "said = []\n"
    "def say(self):\n"
    "    if not said and self.getOptionValue('log_to_console')[1]:\n"
    "        print('Running HiGHS')\n"
    "    said.append(True)\n"
    "    quiet(self)\n"
    "highspy.Highs.enableCallbacks = say\n"
)


@pytest.mark.parametrize("first", ["relaxation", "auto"])
def test_nothing_is_printed(first):
    code = (
        f"{LOUD}import numpy as np\n"
        "from flexmoe_jax.assignment import Problem, solve\n"
        "rng = np.random.default_rng(0)\n"
        "problem = Problem(rng.random((20, 8)), 2, 3, 9, rng.uniform(0.5, 2, 20))\n"
        f"for name in ('{first}', 'auto', 'relaxation'):\n"
        "    solve(problem, name)\n"
        "solve(Problem(rng.random((20, 8)), 2, 0, 1), 'relaxation')\n"
        "print(len(said) > 1)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "True\n"


def test_no_thread_of_highs_is_left_for_a_fork():
    # Another user's HiGHS with three threads, then ours, then theirs; then a fork that succeeds.
    code = (
        "import os, sys, numpy as np, highspy\n"
        "from flexmoe_jax.assignment import Problem, solve\n"
        "def other():\n"
        "    highs = highspy.Highs()\n"
        "    highs.silent()\n"
        "    highs.setOptionValue('threads', 3)\n"
        "    highs.maximize(highs.addVariable(0, 1))\n"
        "    return highs.getModelStatus() == highspy.HighsModelStatus.kOptimal\n"
        "rng = np.random.default_rng(0)\n"
        "problem = Problem(rng.random((20, 8)), 2, 3, 9, rng.uniform(0.5, 2, 20))\n"
        "def ours():\n"
        "    return all(solve(problem, name).gap < 1 for name in ('auto', 'relaxation'))\n"
        "assert other() and ours() and other() and ours()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    sys.exit(0 if ours() else 1)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # HiGHS 1.16 prints a banner for the other user, too.
    assert out.stdout.splitlines()[-1] == "0", out.stderr
