"""Signals, and output whose reader is gone."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from experiments import shutdown
from experiments.shutdown import Wish
from tests.experiments.test_train import ROOT
from tests.limits import HANGS

HUP, INT, TERM = signal.SIGHUP, signal.SIGINT, signal.SIGTERM


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that signals come at, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(shutdown.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("signals", "number", "passed_on"),
    [
        ([(0, INT)], INT, [1]),
        ([(0, HUP)], HUP, [1]),
        ([(0, INT), (2, INT)], INT, [1, 2]),
        ([(0, TERM), (2, INT), (3, TERM)], TERM, [1, 2, 2]),
        # As a batch queue sends it to every process, or a closing terminal and its shell do.
        ([(0, TERM), (0.1, TERM)], TERM, [1]),
        ([(0, HUP), (0.1, HUP), (5, HUP)], HUP, [1]),
        ([(0, HUP), (0.5, TERM)], HUP, [1]),
        ([(0, TERM), (5, HUP)], TERM, [1]),
        ([(0, HUP), (5, INT)], HUP, [1, 2]),
    ],
)
def test_what_counts_as_a_second_wish(clock, signals, number, passed_on):
    heard: list[int] = []
    with Wish(passed_on=heard.append) as wish:
        assert wish.number == 0
        for when, which in signals:
            clock[0] = 100.0 + when
            os.kill(os.getpid(), which)
    assert (wish.number, heard) == (number, passed_on)


def test_signals_that_were_ignored_stay_so_and_handlers_come_back():
    before = signal.signal(HUP, signal.SIG_IGN)
    handler = signal.getsignal(TERM)
    try:
        with Wish() as wish:
            os.kill(os.getpid(), HUP)
            assert signal.getsignal(HUP) is signal.SIG_IGN
            assert signal.getsignal(TERM) is not handler
        assert wish.number == 0
        assert signal.getsignal(TERM) is handler
    finally:
        signal.signal(HUP, before)


def test_output_without_a_reader_is_silent_for_everybody():
    reader, writer = os.pipe()
    stream = shutdown._stream(writer, None)
    print("read", file=stream, flush=True)
    assert os.read(reader, 10) == b"read\n"
    os.close(reader)
    print("unread", file=stream, flush=True)
    print("unread " * 10_000, file=stream)
    stream.flush()
    # As a library would, which knows nothing of the stream.
    assert os.write(writer, b"unread") == 6
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_output_on_a_full_disk_is_silent():
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        os.write(full, b"x")
    print("unread", file=shutdown._stream(full, None), flush=True)
    assert os.write(full, b"x") == 1
    os.close(full)


@pytest.mark.parametrize("launcher", ["train", "sweep", "bench", "report", "table"])
def test_ctrl_c_during_imports_is_one_line(launcher, tmp_path):
    for slow in ("ml_collections", "jax"):
        text = "import time; print('importing', flush=True); time.sleep(60)"
        (tmp_path / f"{slow}.py").write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-m", f"experiments.{launcher}", "moe"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(INT)
    assert process.communicate(timeout=HANGS) == ("", "ended at once\n")
    assert process.returncode == 128 + INT
