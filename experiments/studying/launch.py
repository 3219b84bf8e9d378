"""Starts a run in a process of its own, once, and passes on the wish to stop."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import BinaryIO

from experiments.studying.study import Study, Trial
from flexmoe_jax.errors import printable
from flexmoe_jax.reading import without_waiting


def command(study: Study, trial: Trial, workdir: Path) -> list[str]:
    """The command line of a run; it works from the current folder."""
    config = study.config_file.resolve()
    here = Path.cwd()
    return [
        sys.executable,
        "-m",
        "experiments.train",
        f"--config={config.relative_to(here) if config.is_relative_to(here) else config}",
        f"--workdir={workdir / trial.name}",
        *(f"--config.{name}={_flag(value)}" for name, value in trial.overrides.items()),
    ]


def as_typed(words: Sequence[str]) -> str:
    """A command as one types it."""
    return shlex.join(["python", *words[1:]])


def _flag(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[BinaryIO | None]:
    """Opens a file for appending that no other process has open in this way.

    The lock is the open file's, so a child that inherits the file keeps the lock for as long as it
    lives, even if this process is killed; and a lock never outlives its owners.

    Args:
      path: of the file, made if need be.
      wait: until the others are done.

    Yields:
      The file, or None while another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", opener=without_waiting) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield file


class Interrupts:
    """Passes SIGINT, SIGTERM and SIGHUP on to the run at work, as a context manager.

    A run that is asked to stop finishes its round and saves; asked again, it ends at once.

    Attributes:
      caught: numbers of the signals so far.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        """Nothing is caught before the context is entered."""
        self.caught: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        """Catches signals from here on."""
        self._before = {number: signal.signal(number, self._pass_on) for number in self._NUMBERS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def run(self, words: Sequence[str], log: BinaryIO) -> int:
        """Runs a command to its end, with all that it prints in a file.

        The child is in a process group of its own: a terminal's Ctrl-C comes to this process alone,
        which passes it on once.

        Returns:
          the exit code, minus the signal's number for a child that a signal ended.
        """
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0
        )
        self._child = child
        try:
            if self.caught:
                child.terminate()
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        finally:
            self._child = None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.caught.append(number)
        if self._child is not None:
            self._child.terminate()


def last_line(log: Path, start: int) -> str:
    """The last line with words in it of what was written to a file from byte `start` on."""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        # The end alone: a log may be long.
        file.seek(max(start, end - 20_000))
        lines = file.read().decode(errors="replace").split("\n")
    return printable(next((line.strip() for line in reversed(lines) if line.strip()), ""))
