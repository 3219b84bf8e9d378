from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flexmoe_jax.assignment import Problem, SolverError, flow, solve, worker
from tests.assignment.stress import KINDS
from tests.limits import HANGS

ROOT = Path(__file__).parents[2]
# Reads one question and leaves number, clients, experts and `answer`, a function, to the rest.
READ = """
import sys, time
import numpy as np
read, out = sys.stdin.buffer.read, sys.stdout.buffer
number, clients, experts = np.frombuffer(read(24), np.int64).tolist()
read(8 * (clients * experts + clients + 3 * experts))
def answer(*numbers, of=0):
    out.write(np.array(numbers, np.int64).tobytes() + bytes([of]) * (clients * experts))
    out.flush()
"""


@pytest.fixture
def no_workers() -> Iterator[None]:
    """Returns a fresh pool of workers for this test."""
    worker._close_all()
    yield
    worker._close_all()


def problem(seed: int = 0, clients: int = 20, experts: int = 5) -> Problem:
    rng = np.random.default_rng(seed)
    return Problem(rng.random((clients, experts)), 2, 0, 2 * clients / experts + 1)


def is_right(seed: int) -> bool:
    found, exact = solve(problem(seed), "flow"), solve(problem(seed), "paths")
    return found.status == "optimal" and abs(found.value - exact.value) < 1e-9


@pytest.mark.parametrize("solver", ["flow", "relaxation"])
@pytest.mark.parametrize(("kind", "count"), [("threads", 100), ("interrupts", 12), ("forks", 3)])
def test_each_answer_is_right_whatever_happens_meanwhile(
    solver: str, kind: str, count: int
) -> None:
    command = [sys.executable, "-m", "tests.assignment.stress", kind, solver, str(count)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert ended.returncode == 0, ended.stderr
    outcomes = json.loads(ended.stdout)
    assert sum(outcomes.values()) >= count
    assert outcomes.keys() <= {"right", "interrupted", "child right"}
    assert kind in KINDS


@pytest.mark.usefixtures("no_workers")
def test_a_worker_that_was_killed_is_replaced_without_a_word() -> None:
    assert is_right(0)
    [idle] = worker._IDLE
    os.kill(idle._process.pid, signal.SIGKILL)
    assert is_right(1)
    assert worker._IDLE[0] is not idle


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("answer(number + 1, clients, experts)", "another question"),
        ("answer(number, experts, clients)", "another question"),
        ("answer(number, 10**9, 10**9)", "another question"),
        ("answer(number, 0, 0)", "found no flow"),
        ("answer(number, clients, experts, of=2)", "not of whole clients"),
        ("answer(number, clients, experts, of=1)", "capacity of client 0"),
        ("sys.exit(3)", "process ended"),
        ("time.sleep(60)", "time limit"),
    ],
)
def test_what_is_no_answer_is_an_error_and_its_worker_is_gone(
    rest: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(f"{READ}{rest}\n")
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_SCRIPT", script)
        begin = time.perf_counter()
        with pytest.raises(SolverError, match=message):
            solve(problem(), "flow", time_limit=2.0 if "time" in message else 30.0)
        assert time.perf_counter() - begin < 25.0
    worker._close_all()
    assert is_right(0)


def test_no_answer_is_optimal_on_the_solvers_word(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem()
    best = solve(asked, "paths")
    others = [solve(problem(seed), "paths").assignment for seed in range(1, 6)]
    shuffled = best.assignment[np.random.default_rng(0).permutation(20)]
    # Capacities hold, bounds do not.
    crowded = np.arange(5) < np.full((20, 1), 2)
    for answer in (*others, shuffled, crowded):
        monkeypatch.setattr(flow, "ask", lambda *_, answer=answer, **__: answer.copy())
        found = solve(asked, "flow")
        assert found.status in ("feasible", "violated")
        assert found.bound >= best.value - 1e-9
        assert (found.status == "violated") == found.violation.any()
        assert found.gap > 1e-3 or found.status == "violated"
    monkeypatch.setattr(flow, "ask", lambda *_, **__: best.assignment.copy())
    assert solve(asked, "flow").status == "optimal"


@pytest.mark.usefixtures("no_workers")
def test_pipes_hold_more_than_their_buffers() -> None:
    # 3 MB there and 0.4 MB back, where a pipe holds 64 KB.
    large = problem(0, 8000, 48)
    assert solve(large, "flow").status == "optimal"


def wait_for_end(pid: int, seconds: float) -> bool:
    """Whether a process that is not our child ends, or becomes a zombie, in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_ends_with_whoever_started_it() -> None:
    code = (
        "import os, sys, threading, numpy as np\n"
        "from flexmoe_jax.assignment import Problem, solve, worker\n"
        "solve(Problem(np.eye(4), 1, 0, 1), 'flow')\n"
        "print(worker._IDLE[0]._process.pid, flush=True)\n"
        # Neither a fork that outlives this process nor a minute of work may keep the worker alive.
        "if not os.fork():\n"
        "    sys.stdout.close(); os.close(1); sys.stdin.read(); os._exit(0)\n"
        "if sys.argv[1] == 'busy':\n"
        "    large = Problem(np.random.default_rng(0).random((60000, 64)), 2, 1874, 1876)\n"
        "    threading.Timer(1.5, os._exit, (0,)).start()\n"
        "    solve(large, 'flow')\n"
        "sys.stdin.read()\n"
    )
    for state in ("idle", "busy"):
        process = subprocess.Popen(
            [sys.executable, "-c", code, state],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        assert process.stdout
        pid = int(process.stdout.readline())
        if state == "idle":
            process.kill()
        process.wait()
        # The busy one has seconds of work left.
        assert wait_for_end(pid, 10.0 if state == "idle" else 1.5)
        process.stdin.close()
        process.stdout.close()


def test_a_solve_at_exit_and_one_in_a_signal_handler_are_solves() -> None:
    code = (
        "import atexit, signal, numpy as np\n"
        "from flexmoe_jax.assignment import Problem, solve\n"
        "def ask(*_):\n"
        "    found = solve(Problem(np.eye(4), 1, 0, 1), 'flow', time_limit=20)\n"
        "    print(found.status, found.value)\n"
        "atexit.register(ask)\n"
        "signal.signal(signal.SIGALRM, ask)\n"
        "large = Problem(np.random.default_rng(0).random((2000, 16)), 2, 200, 300)\n"
        "best = solve(large, 'paths').value\n"
        "solve(large, 'flow')\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.004)\n"
        "print(abs(solve(large, 'flow').value - best) < 1e-9)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == ["optimal 4.0", "True", "optimal 4.0"]


def test_a_pool_of_forked_processes_solves() -> None:
    code = (
        "import multiprocessing, numpy as np\n"
        "from flexmoe_jax.assignment import Problem, solve\n"
        "def value(seed):\n"
        "    problem = Problem(np.random.default_rng(seed).random((30, 4)), 1, 7, 8)\n"
        "    return [round(solve(problem, name).value, 9) for name in ('flow', 'paths')]\n"
        "value(0)\n"
        "with multiprocessing.get_context('fork').Pool(3) as pool:\n"
        "    print(all(a == b for a, b in pool.map_async(value, range(12)).get(60)))\n"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert ended.stdout.strip() == "True", ended.stderr


@pytest.mark.usefixtures("no_workers")
def test_many_threads_share_few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_MOST", 2)
    monkeypatch.setattr(worker, "_PATIENCE", HANGS)
    most = []

    def counted(seed: int) -> bool:
        right = is_right(seed)
        most.append(len(worker._STARTED))
        return right

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(counted, range(60)))
    assert max(most) <= 2
