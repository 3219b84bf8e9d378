"""The lock on a folder: one process at a time, and none that has ended."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import locks
from experiments.configs import base
from experiments.locks import TakenError, lock, take
from experiments.workdir import Workdir
from flexmoe_jax.errors import InputError
from tests.experiments.test_train import ROOT, SMALL, launch
from tests.limits import HANGS

HOLDER = """
import sys, time
from pathlib import Path
from experiments.locks import take
kept = take(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(60)
"""


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    path = tmp_path / "x.lock"
    words = [sys.executable, "-c", HOLDER, str(path)]
    holder = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "taken\n"
    with pytest.raises(TakenError):
        take(path)
    with lock(path) as file:
        assert file is None
    holder.kill()
    holder.communicate()
    take(path).close()


FORKS = """
import os, subprocess, sys, time
from pathlib import Path
from experiments.locks import TakenError, take
kept = take(Path(sys.argv[1]))
started = subprocess.Popen(["sleep", "60"], close_fds=False)
forked = os.fork()
if not forked:
    time.sleep(60)
kept.close()
for _ in range(100):
    try:
        again = take(Path(sys.argv[1]))
        break
    except TakenError:
        # The fork may not have come so far as to close its copy.
        time.sleep(0.05)
started.kill()
os.kill(forked, 9)
again.close()
"""


def test_no_child_keeps_a_lock(tmp_path):
    words = [sys.executable, "-c", FORKS, str(tmp_path / "x.lock")]
    subprocess.run(words, cwd=ROOT, check=True, timeout=HANGS)


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "_warned", [])
    for name in ("a", "b"):
        with lock(tmp_path / name) as file:
            assert file is not None
    line = f"{tmp_path}: no locks on this file system (No locks available): see to it that one"
    errors = capsys.readouterr().err
    assert errors.startswith(line)
    assert errors.count("\n") == 1


def test_a_pipe_of_the_name_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.lock")
    with pytest.raises(OSError, match=r"x\.lock"):
        take(tmp_path / "x.lock")


def test_a_workdir_is_locked_from_its_first_file_on(tmp_path):
    folder = tmp_path / "run"
    first, second = Workdir(folder), Workdir(folder)
    first.keep_others_out(create=False)
    assert not folder.exists()
    for workdir in (first, second):
        workdir.check(base.get_config())
    first.open(base.get_config())
    assert second.busy()
    with pytest.raises(InputError, match="another process is at work here"):
        second.open(base.get_config())
    # Of several processes of one run, one writes.
    Workdir(folder, writes=False).open(base.get_config())
    del first
    assert not second.busy()
    second.open(base.get_config())


def test_what_began_and_ended_meanwhile_is_not_overwritten(tmp_path):
    late, other = Workdir(tmp_path / "run"), base.get_config()
    late.check(base.get_config())
    other.seed = 5
    Workdir(tmp_path / "run").open(other)
    with pytest.raises(InputError, match="holds a run with seed=5, not 0"):
        late.open(base.get_config())


def test_a_second_launcher_is_refused_in_one_line_at_once(tmp_path):
    folder = tmp_path / "run"
    first = Workdir(folder)
    first.keep_others_out()
    # A lock file alone is no run: the next process starts one.
    Workdir(folder).check(base.get_config())
    process = launch(f"--workdir={folder}", *SMALL)
    assert (process.returncode, process.stdout) == (2, "")
    line = f"workdir={folder}: another process is at work here; wait for its end"
    assert process.stderr.startswith(line)
    assert process.stderr.count("\n") == 1
    assert [path.name for path in Path(folder).iterdir()] == ["run.lock"]
