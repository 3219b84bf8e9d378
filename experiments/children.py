"""Runs commands in child processes that stop together with this process and do not outlive it."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import BinaryIO

from experiments.shutdown import Wish

# Bytes kept of the output of a child's libraries; its end shows why the child ended.
_KEPT_BYTES = 2**16


class Runner:
    """Runs commands one after the other, as a context manager.

    The first SIGINT, SIGTERM or SIGHUP closes the child's standard input. `experiments.train
    --end_with_input` then finishes its round and saves. The end of this process, for any reason,
    has the same effect. A second signal is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        """Prepares the runner; signals are caught once the context is entered."""
        self._wish = Wish(passed_on=self._pass_on)
        self._child: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None

    def __enter__(self) -> Runner:
        """Starts to catch signals."""
        self._wish.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Restores the former signal handlers."""
        self._wish.__exit__(*error)

    @property
    def caught(self) -> int:
        """Number of the first signal; 0 if there was none."""
        return self._wish.number

    def run(self, words: Sequence[str], log: BinaryIO | None = None) -> tuple[int, str]:
        """Runs a command and waits until it ends.

        The child has its own process group, so a terminal's Ctrl-C reaches only this process.

        Args:
          words: the words of the command.
          log: receives the child's output; by default the child prints where this process does.

        Returns:
          the exit code, or minus the signal's number if a signal ended the child; and the end of
          what the child wrote to its standard input, which is a socket to this process.
        """
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                child = subprocess.Popen(
                    words,
                    stdin=theirs.fileno(),
                    stdout=log,
                    stderr=None if log is None else subprocess.STDOUT,
                    process_group=0,
                )
            self._child, self._line = child, ours
            try:
                if self.caught:
                    self._pass_on(1)
                sent = _Tail(ours)
                code = child.wait()
                sent.join(timeout=1.0)
                return code, bytes(sent.kept).decode(errors="replace")
            except BaseException:
                child.terminate()
                child.wait()
                raise
            finally:
                self._child = self._line = None
                with suppress(OSError):
                    ours.shutdown(socket.SHUT_RDWR)

    def _pass_on(self, times: int) -> None:
        if self._line is not None and times == 1:
            with suppress(OSError):
                self._line.shutdown(socket.SHUT_WR)
        elif self._child is not None:
            self._child.terminate()


class _Tail(threading.Thread):
    """Reads what a child sends, so that the child never blocks, and keeps only the end of it."""

    def __init__(self, line: socket.socket) -> None:
        super().__init__(daemon=True)
        self.kept = bytearray()
        self._line = line
        self.start()

    def run(self) -> None:
        with suppress(OSError):
            while data := self._line.recv(4096):
                self.kept += data
                del self.kept[:-_KEPT_BYTES]
