"""How a launcher ends: by signals, without its output's reader, without its parent.

Imports nothing that takes time, so that it can be in force while the rest is imported.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TextIO

# Windows has no SIGHUP.
NUMBERS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n))
# A closing terminal, `timeout` or a batch queue may send one wish to stop as several signals.
_ONE_WISH_SECONDS = 1.0


def at_once(line: str) -> Callable[[int, FrameType | None], None]:
    """A signal's handler that prints a line and ends the process with 128 + the signal's number.

    It unwinds nothing: an exception raised in the middle of an import, or of a library's clean-up,
    comes out as pages of other errors.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            if os.isatty(1):
                os.write(1, b"\x1b[?25h\n")  # The progress display hides the cursor.
            os.write(2, f"{line}\n".encode())
        os._exit(128 + number)

    return handle


class Wish:
    """The wish to stop, as a context manager: the first of SIGINT, SIGTERM and SIGHUP is noted.

    Another SIGINT or SIGTERM, a second later or more, ends the process at once. Signals that were
    ignored before, as under `nohup` or in the background of a script, stay ignored.

    Args:
      line: printed when the process ends at once.
      passed_on: called with how many times a stop was wished for, 1 or 2, in place of the end.

    Attributes:
      number: of the first signal; 0 as long as there was none.
    """

    def __init__(self, line: str = "", passed_on: Callable[[int], None] | None = None) -> None:
        """Nothing is noted before the context is entered."""
        self.number = 0
        self._at_once, self._passed_on = at_once(line), passed_on
        self._when = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Wish:
        """Notes signals from here on."""
        for number in NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = not self.number
        if first:
            self.number, self._when = number, time.monotonic()
        # A hang-up is said again by everyone who notices it: kernel, shell, session.
        elif number not in (signal.SIGINT, signal.SIGTERM) or self._just_said():
            return
        if self._passed_on:
            self._passed_on(1 if first else 2)
        elif not first:
            self._at_once(number, frame)

    def _just_said(self) -> bool:
        return time.monotonic() - self._when < _ONE_WISH_SECONDS


def end_with_input() -> None:
    """Sends this process SIGTERM once its standard input is closed.

    A parent that keeps the other end, and says nothing, is thus missed even after `kill -9`.
    """

    def wait() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


class _Output(io.FileIO):
    """A file descriptor that goes silent, for libraries too, once it cannot be written to."""

    def write(self, data: bytes | bytearray | memoryview) -> int | None:  # type: ignore[override]
        """Writes what it can; says that all was written where nothing ever will be."""
        try:
            return super().write(data)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def tolerate_lost_output() -> None:
    """Standard output and error go silent when their terminal, pipe or disk no longer takes them.

    What a launcher computes and writes to files must not end with whoever looks on; so a letter
    that the terminal has not, too, is replaced.
    """
    with suppress(OSError):
        # Of descriptors that were closed at the start, no file of ours may take the number.
        while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(free)
    sys.stdout, sys.stderr = _stream(1, sys.stdout), _stream(2, sys.stderr)


def _stream(descriptor: int, like: TextIO | None) -> TextIO:
    if like is not None:
        with suppress(OSError):
            like.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, "w", closefd=False)),  # type: ignore[type-var]
        encoding=getattr(like, "encoding", None) or "utf-8",
        errors="replace",
        # What `python -u` does not buffer at all is written line by line.
        line_buffering=any(
            getattr(like, how, False) for how in ("line_buffering", "write_through")
        ),
    )


def library_errors_to_parent() -> None:
    """What C++ libraries say on standard error goes up standard input to the parent from now on.

    Python's own lines stay where they were. The parent knows whether the others are worth showing:
    JAX says in fifty of them that another process is gone, and aborts.
    """
    sys.stderr.flush()
    sys.stderr = _stream(os.dup(2), sys.stderr)
    os.dup2(0, 2)
