from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from flexmoe_jax.assignment import Problem, SolverError, backends, program, solve
from flexmoe_jax.assignment.loading import load
from tests.limits import HANGS


@pytest.fixture(autouse=True)
def empty_shelf() -> Iterator[None]:
    """Returns a fresh pool of programs for this test."""
    program._SHELF.clear()
    yield
    program._SHELF.clear()


def small(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    return Problem(rng.random((12, 4)), 1, 2, 4)


def test_a_program_is_used_again_and_by_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    solve(small(0), "relaxation")
    [(_, kept)] = program._SHELF
    # As a signal handler would do in the middle of a solve.
    values = []

    def interrupted(self: program.Program, *numbers: object) -> program.Found:
        if not values:
            values.append(None)
            values.append(solve(small(2), "relaxation").value)
        return solve_it(self, *numbers)

    solve_it = program.Program.solve
    monkeypatch.setattr(program.Program, "solve", interrupted)
    assert solve(small(1), "relaxation").value == pytest.approx(solve(small(1), "paths").value)
    assert values[1] == pytest.approx(solve(small(2), "paths").value)
    assert len(program._SHELF) == 2
    assert kept in {item[1] for item in program._SHELF}


def test_a_program_whose_solving_was_interrupted_is_thrown_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solve(small(0), "relaxation")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(program, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            solve(small(1), "relaxation")
    assert not program._SHELF
    assert solve(small(2), "relaxation").status == "optimal"


def test_modelling_is_not_for_whoever_interrupts_it() -> None:
    with backends.modelling(), pytest.raises(SolverError, match="use auto in signal handlers"):
        solve(small(0), "relaxation")
    assert solve(small(0), "relaxation").status == "optimal"


def test_a_thread_that_models_at_a_fork_does_not_hold_up_the_forked_process() -> None:
    code = (
        "import os, threading, numpy as np\n"
        "from flexmoe_jax.assignment import Problem, backends, solve\n"
        "problem = Problem(np.eye(4), 1, 0, 1)\n"
        "solve(problem, 'relaxation')\n"
        "inside, done = threading.Event(), threading.Event()\n"
        "def model():\n"
        "    with backends.modelling():\n"
        "        inside.set(); done.wait()\n"
        "threading.Thread(target=model).start()\n"
        "inside.wait()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(0 if solve(problem, 'relaxation').status == 'optimal' else 1)\n"
        "print(os.waitpid(child, 0)[1])\n"
        "done.set()\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANGS)
    assert out.stdout == "0\n"


def test_a_library_is_loaded_out_of_reach_of_interruptions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    (tmp_path / "slow_library.py").write_text(
        "import threading\nwhere = threading.current_thread()\n"
    )
    (tmp_path / "broken_library.py").write_text("raise ValueError('broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("slow_library").where is not threading.main_thread()
    assert load("slow_library") is sys.modules.pop("slow_library")
    with pytest.raises(ValueError, match="broken"):
        load("broken_library")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_jax_that_ran_before_a_fork_is_an_error_and_auto_does_without() -> None:
    code = (
        "import os, warnings, numpy as np\n"
        "from flexmoe_jax.assignment import Problem, SolverError, engine, solve\n"
        "rng = np.random.default_rng(0)\n"
        "labels = rng.dirichlet(np.ones(3), 40)\n"
        "mixed = {'descriptor': labels, 'diversity': 0.01}\n"
        "problem = Problem(rng.random((40, 4)), 2, 20, 20, **mixed)\n"
        # More than these few pairs go to `dual`.
        "engine._MANY_PAIRS = 100\n"
        "solve(problem, 'auto')\n"
        "warnings.simplefilter('ignore')\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    try:\n"
        "        solve(problem, 'dual')\n"
        "    except SolverError as error:\n"
        "        print(error, flush=True)\n"
        "    print(solve(problem, 'auto').gap < 0.01, flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANGS)
    error, solved = out.stdout.splitlines()
    assert error.startswith("dual: JAX ran before this process was forked off")
    assert solved == "True"
