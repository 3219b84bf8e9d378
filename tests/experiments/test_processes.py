"""One run over several processes, as on several hosts; here they talk over the loopback."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests.experiments.test_train import ROOT, SMALL, command, rows

# One of six clients sends updates that are not numbers.
TWO_ROUNDS = (
    *SMALL,
    "--config.rounds=2",
    "--config.eval.every=1",
    "--config.clients.per_round=6",
    "--config.faults.share=0.1",
)


def launch_together(count: int, workdir: Path, *arguments: str) -> list[tuple[int, str]]:
    """Exit code and stderr of each of the processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = (f"--coordinator=localhost:{port}", f"--process_count={count}")
    processes = [
        subprocess.Popen(
            command(f"--workdir={workdir}", *arguments, *together, f"--process_id={number}"),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Rows of the run in one process, on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    subprocess.run(
        command(f"--workdir={workdir}", *TWO_ROUNDS, "--config.execution.devices=1"),
        cwd=ROOT,
        check=True,
        timeout=120,
    )
    return rows(workdir)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_give_the_numbers_of_one(
    tmp_path: Path, one: list[dict], processes: int
) -> None:
    # Four devices in all, for a cohort of six clients, whose examples are sent.
    apart = ("--config.execution.devices=4", "--config.execution.data=host")
    ended = launch_together(processes, tmp_path, *TWO_ROUNDS, *apart)
    assert [code for code, _ in ended] == [0] * processes, ended
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
    ended = subprocess.run(
        command(f"--workdir={tmp_path / 'run'}", *flags),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert line in ended.stderr
    assert not (tmp_path / "run").exists()
