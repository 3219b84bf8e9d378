"""One run over several processes, as on several hosts; here they use the loopback interface."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import devices
from experiments.configs import digits
from flexmoe_jax.errors import InputError
from tests.experiments.test_rendezvous import free_port
from tests.experiments.test_train import ROOT, SMALL, command, rows
from tests.limits import HANGS

# One of six clients sends updates that are not numbers.
TWO_ROUNDS = (
    *SMALL,
    "--config.rounds=2",
    "--config.eval.every=1",
    "--config.clients.count=6",
    "--config.clients.per_round=6",
    "--config.faults.share=0.1",
)

# Two devices for each of two processes, for a cohort of six clients, whose examples are sent.
APART = ("--config.execution.devices=4", "--config.execution.data=host")


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments, report=True),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    _, errors = process.communicate(timeout=HANGS)
    return process.returncode, errors


def launch_together(count: int, workdir: Path, *arguments: str) -> list[tuple[int, str]]:
    """Exit code and stderr of each of the processes."""
    port = free_port()
    together = (f"--coordinator=localhost:{port}", f"--process_count={count}")
    return [
        ended(process)
        for process in [
            start(f"--workdir={workdir}", *arguments, *together, f"--process_id={number}")
            for number in range(count)
        ]
    ]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Rows of the run in one process, on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    subprocess.run(
        command(f"--workdir={workdir}", *TWO_ROUNDS, "--config.execution.devices=1"),
        cwd=ROOT,
        check=True,
        timeout=HANGS,
    )
    return rows(workdir)


def test_several_processes_give_the_numbers_of_one(tmp_path: Path, one: list[dict]) -> None:
    assert launch_together(2, tmp_path, *TWO_ROUNDS, *APART) == [(0, "")] * 2
    several = rows(tmp_path)
    assert [row["round"] for row in several] == [1, 2]
    for alone, together in zip(one, several, strict=True):
        assert together["clients/quarantined"] == alone["clients/quarantined"] == 1
        for key in ("train/loss", "eval/global_accuracy", "eval/server_accuracy"):
            assert together[key] == pytest.approx(alone[key], abs=1e-4)
        assert together["load/assigned"] == alone["load/assigned"]
        assert together["load/usage"] == pytest.approx(alone["load/usage"])
    assert (tmp_path / "checkpoints" / "2").is_dir()
    assert (tmp_path / "report" / "index.html").is_file()


def test_a_users_mistake_is_no_lost_process_whatever_it_quotes(tmp_path: Path) -> None:
    mistaken = (*SMALL, "--config.data.name=gloo.npz", "--config.execution.devices=2")
    line = "data.name=gloo.npz: there is no such file\n"
    assert launch_together(2, tmp_path / "run", *mistaken) == [(2, line)] * 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--process_id=0",), "--coordinator=None: give all of"),
        (
            ("--coordinator=localhost:1", "--process_count=2", "--process_id=2"),
            "--process_id=2: give 0 to 1",
        ),
        (
            (
                "--coordinator=localhost:1",
                "--process_count=2",
                "--process_id=0",
                "--config.execution.devices=3",
            ),
            "execution.devices=3: give a multiple of --process_count=2",
        ),
    ],
)
def test_flags_that_do_not_fit_together(tmp_path: Path, flags: tuple[str, ...], line: str) -> None:
    code, errors = ended(start(f"--workdir={tmp_path / 'run'}", *flags))
    assert (code, errors.count("\n")) == (2, 1)
    assert line in errors
    assert not (tmp_path / "run").exists()


# Of a task that Slurm itself started, beside one that does not come.
TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}


def test_a_task_of_slurm_is_one_of_several_and_says_who_is_missing(tmp_path: Path) -> None:
    words = command(f"--workdir={tmp_path / 'run'}", "--join_seconds=1")
    process = subprocess.run(
        ["sh", "-c", 'SLURM_TASK_PID=$$ exec "$@"', "sh", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
        env=os.environ | TASK | {"JAX_COORDINATOR_PORT": str(free_port())},
    )
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert "no process 0 within 1 s" in process.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="finds a child as Linux tells of it")
def test_strangers_do_nothing_and_a_killed_process_ends_all_in_a_line(
    tmp_path: Path,
) -> None:
    port, workdir = free_port(), tmp_path / "run"
    # The programs are found compiled if the test above has run.
    together = (*TWO_ROUNDS, *APART, "--config.rounds=100000")
    together += (f"--coordinator=localhost:{port}", "--process_count=2", f"--workdir={workdir}")
    first, second = (start(*together, f"--process_id={number}") for number in range(2))
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert (first.poll(), second.poll()) == (None, None), (ended(first), ended(second))
        time.sleep(0.05)
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000)):
        with socket.create_connection(("localhost", port)) as call:
            call.sendall(words)
    # One that takes a number twice does not come as far as JAX, which would abort all three.
    code, line = ended(start(*together, "--process_id=1", "--join_seconds=1"))
    assert (code, line.count("\n")) == (2, 1)
    assert f"--coordinator=localhost:{port}: no process 0 within 1 s" in line
    before = len(rows(workdir))
    while len(rows(workdir)) == before:
        assert (first.poll(), second.poll()) == (None, None), (ended(first), ended(second))
        time.sleep(0.05)
    # The one that computes, not the one that watches over it.
    children = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert ended(second) == (128 + signal.SIGKILL, "ended by SIGKILL\n")
    code, line = ended(first)
    assert (code, line.count("\n")) == (1, 1)
    assert line.startswith("another process of this run has ended, or cannot be reached; ")
    assert len(rows(workdir)) >= before


def test_processes_that_read_different_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[np.ndarray] = []

    def gather(digest: np.ndarray) -> np.ndarray:
        gathered.append(digest)
        return np.stack(gathered)

    monkeypatch.setattr(devices.jax, "process_count", lambda: 2)
    monkeypatch.setattr(devices.multihost_utils, "process_allgather", gather)
    config = digits.get_config()
    config.edge.tiers = "t.toml"
    for _ in range(2):
        devices.require_same_inputs(config, {"data.train": "a1", "edge.tiers": "b1"})
    for train, tiers, line in (("a2", "b1", "data.name=digits"), ("a1", "b2", "edge.tiers=t.toml")):
        with pytest.raises(InputError, match=f"{line}: is not the same for process 2 as for"):
            devices.require_same_inputs(config, {"data.train": train, "edge.tiers": tiers})
        gathered.pop()
