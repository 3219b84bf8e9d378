"""Safe readers for files that may be damaged, with limits and one error type for all damage.

A path may name a pipe or a device, on which a reader would wait or read for ever. A file may be
larger than memory. JSON may nest deeper than Python's stack, or hold numbers of any length. The
functions here refuse files that this package would not write, so that callers have only two cases:
they get the content, or an error with the reason.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeGuard

from flexmoe_jax.errors import printable

# Files that this package writes nest less than 8 deep. Python's own limit is its stack.
_DEEPEST = 32
# Number of digits of the largest 64-bit integer.
_LONGEST = 19
# The limit and use of memory of a container (cgroup 2).
_CONTAINER = Path("/sys/fs/cgroup")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnreadableError(ValueError):
    """Raised for a file whose content cannot be used; the message omits the file's name."""

    def __init__(self, reason: object) -> None:
        """Turns the reason into one printable line."""
        super().__init__(printable(reason, most=300))


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BufferedReader]:
    """Opens a regular file without blocking; refuses pipes, sockets, devices and folders.

    Raises:
      UnreadableError: the path names another kind of file, or is not a valid path.
      OSError: the file cannot be opened, most often `FileNotFoundError`.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # A null character in the name.
        raise UnreadableError(error) from error
    # Checked before opening: opening alone may wind a tape, or wait for the pipe's other end.
    _require_regular(mode)
    with open(path, "rb", opener=without_waiting) as file:
        _require_regular(os.fstat(file.fileno()).st_mode)
        yield file


def without_waiting(path: str, flags: int) -> int:
    """An `opener` for `open` that does not wait for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no plain file")
        raise UnreadableError(f"is {kind}, not a file")


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """Reads the content of a file.

    Args:
      path: path of the file.
      most: largest allowed size in bytes.

    Raises:
      UnreadableError: the file is larger, or is not a regular file.
      OSError: the file cannot be opened.
    """
    with open_regular(path) as file:
        # The size is checked first, so that a refused file takes no memory. The content is checked
        # again below, because the file may still grow.
        large = os.fstat(file.fileno()).st_size > most
        content = b"" if large else file.read(most + 1)
    if large or len(content) > most:
        raise UnreadableError(f"is larger than the {most:,} bytes that are read")
    return content


def read_text(path: str | os.PathLike[str], most: int) -> str:
    """Reads the text of a UTF-8 file, with or without a byte order mark.

    Args:
      path: path of the file.
      most: largest allowed size in bytes.

    Raises:
      UnreadableError: the file is larger, is not a regular file, or is not UTF-8 text.
      OSError: the file cannot be opened.
    """
    return _decoded(read_bytes(path, most))


def read_json(path: str | os.PathLike[str], most: int = 2**20) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Args:
      path: path of the file.
      most: largest allowed size in bytes.

    Raises:
      UnreadableError: the file holds no JSON object, or exceeds the limits.
      OSError: the file cannot be opened.
    """
    content = parse_json(read_bytes(path, most))
    if not isinstance(content, dict):
        raise UnreadableError("holds no JSON object")
    return content


def parse_json(content: bytes) -> Any:
    """Parses JSON of limited depth, with integers of at most 19 digits; accepts NaN and Infinity.

    Raises:
      UnreadableError: the content is not JSON, or exceeds these limits.
    """
    text = _decoded(content)
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise UnreadableError(f"is nested more than {_DEEPEST} deep") from None
    except ValueError as error:
        raise UnreadableError(f"is no JSON: {error}") from error
    # Every level needs an opening bracket; counting brackets is faster than measuring the depth.
    if text.count("[") + text.count("{") > _DEEPEST and _depth(value) > _DEEPEST:
        raise UnreadableError(f"is nested more than {_DEEPEST} deep")
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a number; true and false are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > _LONGEST:
        raise UnreadableError(f"it holds a whole number of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_whole)


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        depth += 1
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return depth


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"is no UTF-8 text: byte {error.start} is wrong") from error


def require_memory(needed: int) -> None:
    """Checks that memory is available before it is allocated.

    Args:
      needed: bytes to allocate.

    Raises:
      UnreadableError: fewer bytes are free.
    """
    free = _free_memory()
    if needed > free:
        raise UnreadableError(f"takes {needed / 1e9:,.1f} GB of memory, of {free / 1e9:,.1f} free")


def _free_memory() -> int:
    """Returns the free bytes that Linux reports: of the machine, or of the container if fewer."""
    free = 2**63
    try:
        kilobytes = _table(Path("/proc/meminfo"))
        free = 1024 * (kilobytes["MemAvailable:"] + kilobytes["SwapFree:"])
        # The file says "max" if no limit is set.
        limit = int((_CONTAINER / "memory.max").read_text())
        used = int((_CONTAINER / "memory.current").read_text())
        # Linux counts its cache of files as used, but gives it up when memory is needed.
        use = _table(_CONTAINER / "memory.stat")
        free = min(free, limit - used + use["active_file"] + use["inactive_file"])
    except (OSError, ValueError, KeyError, IndexError):
        pass
    return free


def _table(path: Path) -> dict[str, int]:
    """Reads lines of a name, a number and possibly a unit."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
