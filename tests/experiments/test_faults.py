"""Runs, as processes, on which real faults of the machine act."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.build import build
from experiments.cli import flat_fields
from experiments.configs import base, digits
from experiments.workdir import Workdir
from flexmoe_jax.checkpoint import Checkpoints
from flexmoe_jax.errors import InputError
from tests.experiments.test_train import ROOT, SMALL, command, launch, rows, timeless
from tests.limits import HANGS

LONG = (*SMALL, "--config.rounds=6", "--config.checkpoint.every=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Returns a run without any fault."""
    workdir = tmp_path_factory.mktemp("faults") / "finished"
    process = launch(f"--workdir={workdir}", *LONG)
    assert (process.returncode, process.stderr) == (0, "")
    return workdir


def assert_same_run(workdir: Path, finished: Path) -> None:
    """Checks that rounds, arrays and final state are the same, bit for bit."""
    assert timeless(workdir) == timeless(finished)
    found, expected = (np.load(folder / "arrays.npz") for folder in (workdir, finished))
    assert set(found) == set(expected)
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    states = [leaves(folder / "checkpoints" / "6") for folder in (workdir, finished)]
    assert len(states[0]) > 10
    assert states[0] == states[1]
    assert json.loads((workdir / "summary.json").read_text())["status"] == "finished"


def leaves(checkpoint: Path) -> dict[str, bytes]:
    import jax
    import orbax.checkpoint as ocp

    state = ocp.PyTreeCheckpointer().restore(checkpoint)
    paths, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in paths}


def start(workdir: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(f"--workdir={workdir}", *arguments),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + HANGS
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def test_kills_at_any_moment_change_nothing(finished, tmp_path):
    workdir, draw = tmp_path / "killed", random.Random(5)
    checkpoints = workdir / "checkpoints"
    for reached in (
        lambda: (workdir / "metrics.jsonl.tmp").exists() or (workdir / "metrics.jsonl").exists(),
        lambda: any(checkpoints.glob("unfinished*")),
        lambda: len(rows_so_far(workdir)) >= 3,
    ):
        process = start(workdir, *LONG)
        wait_until(reached, process)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        assert "Traceback" not in process.communicate()[1]
    told = Workdir(workdir).seconds()
    process = launch(f"--workdir={workdir}", *LONG)
    assert (process.returncode, process.stderr) == (0, "")
    assert_same_run(workdir, finished)
    # The time of those that were killed is in it, too.
    clock = [row["time/run_seconds"] for row in rows(workdir)]
    assert clock == sorted(clock)
    assert 0 < told < clock[-1] < Workdir(workdir).seconds()


def test_the_time_of_rounds_that_are_done_again_is_kept(tmp_path):
    workdir, config = Workdir(tmp_path), base.get_config()
    workdir.open(config)
    for number in (1, 2, 3):
        workdir.append({"round": number, "time/run_seconds": 10.0 * number})
    # Killed after round 3 with a checkpoint of round 1; then once more before any round.
    del workdir
    for _ in range(2):
        again = Workdir(tmp_path)
        again.open(config)
        again.keep_rounds(1)
        assert again.seconds() == 30.0
        del again


def rows_so_far(workdir: Path) -> list[bytes]:
    metrics = workdir / "metrics.jsonl"
    return metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []


def test_damage_to_the_newest_of_all_files_is_mended(finished, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(finished, workdir)
    arrays = max((workdir / "checkpoints" / "6").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40] + b"\xc3")
    (workdir / "summary.json").write_text('{"seconds": ')
    (workdir / "arrays.npz").write_bytes(b"PK")
    process = launch(f"--workdir={workdir}", *LONG)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.count("the checkpoint of round 6 is") == 1
    assert "continuing after round 4 of 6" in process.stdout
    assert_same_run(workdir, finished)


@pytest.mark.parametrize("end", [b"", b'{"round": 3', b'{"round": 3, "x": "\xc3', b"[3]\n", b"7\n"])
def test_the_end_of_the_metrics_may_be_anything(tmp_path, end):
    workdir = Workdir(tmp_path)
    for number in (1, 2):
        workdir.append({"round": number, "train/loss": float("nan")})
    whole = workdir.metrics_path.read_bytes()
    workdir.metrics_path.write_bytes(whole + end)
    assert [row["round"] for row in workdir.read()] == [1, 2]
    workdir.keep_rounds(2)
    assert workdir.metrics_path.read_bytes() == whole
    workdir.append({"round": 3})
    assert [row["round"] for row in workdir.read()] == [1, 2, 3]


@pytest.mark.parametrize("content", [b"", b'{"seed"', b"\xff\xfe", b"[]", b"3", b"null"])
def test_a_config_or_summary_of_garbage(tmp_path, content):
    workdir = Workdir(tmp_path)
    (tmp_path / "summary.json").write_bytes(content)
    assert workdir.seconds() == 0.0
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="workdir") as refusal:
        workdir.check(base.get_config())
    assert "\n" not in str(refusal.value)


def test_a_config_cut_off_by_a_kill_is_not_in_the_way(tmp_path):
    (tmp_path / "config.json.tmp").write_text('{"seed"')
    workdir = Workdir(tmp_path)
    workdir.check(base.get_config())
    workdir.open(base.get_config())
    workdir.check(base.get_config())
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "run.lock"}


def test_files_that_cannot_be_written_are_named_and_kept(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.write_summary({"seconds": 3.0})
    workdir.write_arrays(x=np.arange(3))
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).random(1000)
    for write, name in (
        (lambda: workdir.append({"round": 1, "load": noise.tolist()}), "metrics.jsonl"),
        (lambda: workdir.write_summary({"load": noise.tolist()}), "summary.json"),
        (lambda: workdir.write_arrays(x=noise), "arrays.npz"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, most))
        try:
            with pytest.raises(OSError, match="File too large") as failure:
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
        assert failure.value.filename == str(tmp_path / name)
    assert workdir.seconds() == 3.0
    assert np.load(tmp_path / "arrays.npz")["x"].tolist() == [0, 1, 2]
    assert workdir.read() == []
    assert not list(tmp_path.glob("*.tmp"))


def one_line(text: str) -> str:
    assert len(text.splitlines()) == 1, text
    return text


def test_a_report_that_cannot_be_written_is_one_line_and_a_second_try(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    words = command(f"--workdir={workdir}", *LONG, report=True)
    process = subprocess.run(
        ["sh", "-c", 'ulimit -f 120; exec "$@"', "sh", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert process.returncode == 1
    line = one_line(process.stderr)
    assert line.startswith(f"{workdir / 'report' / 'index.html'}: File too large; ")
    assert "the same command goes on" in line
    assert list((workdir / "report").iterdir()) == []


UNTIL_THE_DISK_IS_FULL = """
mount -t tmpfs -o size=700k none "$1" || exit 77
disk="$1" kept="$2"; shift 2
"$@"; echo "exit code $?" >&2
find "$disk" -name "*tmp*" -o -name "unfinished*" >&2
mount -o remount,size=100m "$disk"
"$@" && cp -r "$disk/run" "$kept"
"""


def test_a_run_goes_on_when_a_full_disk_has_room_again(finished, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    run = command(f"--workdir={disk / 'run'}", *LONG)
    script = ["unshare", "-rm", "sh", "-c", UNTIL_THE_DISK_IS_FULL, "sh"]
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("needs Linux's unshare")
    process = subprocess.run(
        [*script, str(disk), str(tmp_path / "kept"), *run],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    if process.returncode == 77 or "unshare:" in process.stderr:
        pytest.skip(f"no file system may be mounted here: {process.stderr}")
    assert process.returncode == 0, process.stderr
    line, code, *left = process.stderr.splitlines()
    assert not left, "something half-written is in the way"
    assert line.startswith(f"{disk / 'run' / 'checkpoints'}: No space left on device; ")
    assert code == "exit code 1"
    assert "continuing after round 2 of 6" in process.stdout
    assert_same_run(tmp_path / "kept", finished)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_workdir_that_may_not_be_written_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    process = launch(f"--workdir={tmp_path / 'run'}", *LONG)
    tmp_path.chmod(0o700)
    assert process.returncode == 1
    assert one_line(process.stderr).startswith(f"{tmp_path / 'run'}: Permission denied; ")


def test_a_terminal_that_closes_while_compiling_ends_after_the_first_round(tmp_path):
    workdir = tmp_path / "stopped"
    words = command(f"--workdir={workdir}", *LONG, "--config.rounds=1000", report=True)
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *words],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    deadline = time.monotonic() + HANGS
    while not (workdir / "config.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.close(ours)
    assert process.wait(timeout=HANGS) == 128 + signal.SIGHUP
    reached = len(rows(workdir))
    assert 1 <= reached < 1000
    assert json.loads((workdir / "summary.json").read_text())["status"] == "interrupted"
    assert Checkpoints(workdir / "checkpoints", keep=2).rounds()[-1] == reached
    assert (workdir / "report" / "index.html").exists()


ON_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_solver_out_of_time_is_said_and_the_run_goes_on(tmp_path):
    workdir = tmp_path / "hasty"
    hasty = ("--config.rounds=2", "--config.assignment.time_limit=1e-9")
    hasty += ("--config.assignment.load=clients",)
    process = launch(f"--workdir={workdir}", *SMALL, *hasty)
    assert (process.returncode, process.stderr) == (0, "")
    for number in (1, 2):
        assert f"round {number}: fallback: time limit exceeded" in process.stdout
    for row in rows(workdir):
        assert row["assignment/status"] == "fallback: time limit exceeded"
        load = row["load/assigned"]
        assert max(load) - min(load) <= 1


TINY = {
    "rounds": 1,
    "data.train_limit": 120,
    "data.test_limit": 50,
    "partition.min_per_client": 2,
    "clients.count": 4,
    "clients.capacity": "1-2",
    "model.backbone": "mlp",
    "model.widths": (8,),
    "model.experts": 4,
    "model.hidden": 8,
    "execution.devices": 1,
    "eval.batch_size": 50,
}
HOSTILE = (
    *(None, True, -1, 0, 3, 10**9, 2**31, -(2**63), 2**64, 0.5, -0.5, 5e-324, 1e300),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "\n", "\0", "../..", "ünïcode ✓", ":"),
    *("memory", "1-4", "4-1", "0-0", "-", "1-99999999999", "phone:1", "phone:nan", "full", "usage"),
    *((), (0,), (8,), (10**9,), ("a",), (True,), [], [1, 2], [99], [None], {}, b"x"),
)


# Downloads are left alone: what they do depends on the network.
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(flat_fields(base.get_config()).keys() - {"data.download"})),
            st.sampled_from(HOSTILE),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_a_config_of_any_values_is_built_or_refused_in_one_line(changes):
    config = digits.get_config()
    config.update_from_flattened_dict(TINY)
    for field, value in changes:
        # The command line turns a TypeError into a line.
        with contextlib.suppress(TypeError):
            config.update_from_flattened_dict({field: value})
    refusal = None
    try:
        build(config)
    except InputError as error:
        refusal = error
    assert refusal is None or len(str(refusal).splitlines()) == 1
