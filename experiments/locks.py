"""A file that one process at a time may have open: a lock that ends with its owner."""

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

# What file systems without locks answer: Lustre mounted without `flock`, some FUSE ones.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class TakenError(Exception):
    """Another process has the lock."""


def take(path: Path, wait: bool = False) -> BinaryIO:
    """Opens a file for appending that nobody else has open in this way.

    The lock is the open file's: it ends when the file is closed, or its process, even by `kill -9`.
    No process that this one starts keeps it. Where the file system has no locks, a line on standard
    error says so, and the file is opened all the same.

    Args:
      path: of the file, made if it is not there; it stays.
      wait: until the others are done.

    Raises:
      TakenError: another process, or another part of this one, has it open.
      OSError: the file cannot be opened.
    """
    # A pipe of that name would wait for whoever reads it.
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
    """`take` as a context manager, which makes the folder, too.

    Yields:
      The file, or None while another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = take(path, wait)
    except TakenError:
        yield None
        return
    with file:
        yield file
