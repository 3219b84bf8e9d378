"""A run in a process of its own, which is asked to stop with this one and does not outlive it."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import BinaryIO

from experiments.endings import Wish

# Of what a child's libraries say; the end tells why it ended.
_KEPT_BYTES = 2**16


class Runner:
    """Runs commands, one after the other, as a context manager.

    A first SIGINT, SIGTERM or SIGHUP closes the child's standard input, which `experiments.train
    --end_with_input` takes as the wish to finish its round and save. So does the end of this
    process, whatever ends it. A second signal is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        """Signals are caught once the context is entered."""
        self._wish = Wish(passed_on=self._pass_on)
        self._child: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None

    def __enter__(self) -> Runner:
        """Catches signals from here on."""
        self._wish.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Signals do again what they did before."""
        self._wish.__exit__(*error)

    @property
    def caught(self) -> int:
        """Number of the first signal; 0 where there was none."""
        return self._wish.number

    def run(self, words: Sequence[str], log: BinaryIO | None = None) -> tuple[int, str]:
        """Runs a command to its end.

        The child is in a process group of its own: a terminal's Ctrl-C comes to this process alone.

        Args:
          words: of the command.
          log: gets all that the child prints; by default it prints where this process does.

        Returns:
          the exit code, minus the signal's number for a child that a signal ended; and the last of
          what the child sent up its standard input.
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
    """Keeps the last of what comes from a child, which must not wait for a reader."""

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
