"""Handles the end of a launcher: by a signal, or after its output's reader or its parent is gone.

This module imports nothing slow, so that it is active while the rest is imported.
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
# A closing terminal, `timeout` or a batch queue may send several signals for one stop request.
_ONE_WISH_SECONDS = 1.0


def at_once(line: str) -> Callable[[int, FrameType | None], None]:
    """Returns a signal handler that prints a line and exits with 128 + the signal's number.

    The handler does not unwind the stack: an exception raised in the middle of an import, or of a
    library's clean-up, would show up as pages of other errors.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            if os.isatty(1):
                os.write(1, b"\x1b[?25h\n")  # The progress display hides the cursor.
            os.write(2, f"{line}\n".encode())
        os._exit(128 + number)

    return handle


class Wish:
    """A stop request, as a context manager: records the first SIGINT, SIGTERM or SIGHUP.

    Another SIGINT or SIGTERM, one second later or more, ends the process at once. Signals that were
    already ignored, as under `nohup` or in the background of a script, stay ignored.

    Args:
      line: printed when the process ends at once.
      passed_on: called with the number of stop requests, 1 or 2. If given, the process does not end
        at once.

    Attributes:
      number: number of the first signal; 0 as long as there was none.
    """

    def __init__(self, line: str = "", passed_on: Callable[[int], None] | None = None) -> None:
        """Prepares the request; signals are recorded once the context is entered."""
        self.number = 0
        self._at_once, self._passed_on = at_once(line), passed_on
        self._when = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Wish:
        """Starts to record signals."""
        for number in NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Restores the former signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = not self.number
        if first:
            self.number, self._when = number, time.monotonic()
        # Kernel, shell and session may each send SIGHUP, so a repeated one does not count.
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

    The parent keeps the other end open and writes nothing. The process thus notices that its
    parent is gone, even after `kill -9`.
    """

    def wait() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


class _Output(io.FileIO):
    """A file descriptor that discards output, of libraries too, once a write to it fails."""

    def write(self, data: bytes | bytearray | memoryview) -> int | None:  # type: ignore[override]
        """Writes the data; after a failure it discards them and reports them as written."""
        try:
            return super().write(data)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def tolerate_lost_output() -> None:
    """Makes standard output and error discard text that their terminal, pipe or disk rejects.

    A launcher must go on computing and writing files when its output is lost. For the same reason,
    characters that the terminal cannot encode are replaced.
    """
    with suppress(OSError):
        # Occupy descriptors 0 to 2 if they were closed at start, so that no file of ours gets them.
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
        # Output that `python -u` leaves unbuffered is written line by line.
        line_buffering=any(
            getattr(like, how, False) for how in ("line_buffering", "write_through")
        ),
    )


def library_errors_to_parent() -> None:
    """Redirects the error messages of C++ libraries to the parent, through standard input.

    Python's own lines still go to standard error. The parent decides whether the other lines are
    worth showing: JAX prints fifty of them when another process is gone, and aborts.
    """
    sys.stderr.flush()
    sys.stderr = _stream(os.dup(2), sys.stderr)
    os.dup2(0, 2)
