"""File locks: one process at a time holds a lock, and the lock ends with that process."""

from __future__ import annotations

import errno
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Errors of file systems without locks: Lustre mounted without `flock`, some FUSE file systems.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class TakenError(Exception):
    """Another process holds the lock."""


def take(path: Path, wait: bool = False) -> BinaryIO:
    """Opens a file for appending and locks it.

    The lock belongs to the open file. It ends when the file is closed or the process ends, even by
    `kill -9`. Child processes do not inherit it. If the file system has no locks, a line on
    standard error says so, and the file is opened without a lock.

    Args:
      path: path of the file; it is created if missing, and is never deleted.
      wait: wait until other processes have released the lock.

    Raises:
      TakenError: another process, or another part of this one, holds the lock.
      OSError: the file cannot be opened.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for a reader.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
    file = os.fdopen(os.open(path, flags, 0o666), "ab")
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise TakenError(path) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            file.close()
            raise
        _warn_once(path.parent, error)
    if hasattr(os, "register_at_fork"):
        held = weakref.ref(file)
        os.register_at_fork(after_in_child=lambda: _close(held()))
    return file


_warned: list[Path] = []


def _warn_once(folder: Path, error: OSError) -> None:
    if not _warned:
        _warned.append(folder)
        print(
            f"{folder}: no locks on this file system ({error.strerror}): see to it that one "
            "process at a time works there",
            file=sys.stderr,
        )


def _close(file: BinaryIO | None) -> None:
    if file is not None:
        file.close()


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[BinaryIO | None]:
    """Runs `take` as a context manager, and creates the folder if needed.

    Yields:
      The file, or None if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = take(path, wait)
    except TakenError:
        yield None
        return
    with file:
        yield file
