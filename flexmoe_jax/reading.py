"""Reads files to which anything may have happened: with limits, and one error for all damage.

A name may belong to a pipe or a device, which would be waited for or read for ever; a file may be
larger than memory; JSON may nest deeper than Python's stack, or hold numbers of any length. What is
not as we write it is refused here, so that whoever reads has two cases: the content, or a reason.
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

# Nesting of anything that we write is below 8. Python's own limit is that of its stack.
_DEEPEST = 32
# Digits of the largest 64-bit number.
_LONGEST = 19
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnreadableError(ValueError):
    """A file whose content cannot be used; its text says why, without the file's name."""

    def __init__(self, reason: object) -> None:
        """Makes one printable line of the reason."""
        super().__init__(printable(reason, most=300))


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BufferedReader]:
    """Opens a file that ends: no pipe, socket, device or folder. Never waits.

    Raises:
      UnreadableError: it is another kind of file, or the name is none.
      OSError: the system does not let us, above all `FileNotFoundError`.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # A zero in the name.
        raise UnreadableError(error) from error
    # Before it is opened: that alone may wind a tape, or wait for the pipe's other end.
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
    """The content of a file.

    Args:
      path: of the file.
      most: bytes that it may have.

    Raises:
      UnreadableError: it has more, or is no regular file.
      OSError: the system does not let us.
    """
    with open_regular(path) as file:
        # Asked first, so that no memory is taken for what is refused; a file may yet grow.
        large = os.fstat(file.fileno()).st_size > most
        content = b"" if large else file.read(most + 1)
    if large or len(content) > most:
        raise UnreadableError(f"is larger than the {most:,} bytes that are read")
    return content


def read_text(path: str | os.PathLike[str], most: int) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Args:
      path: of the file.
      most: bytes that it may have.

    Raises:
      UnreadableError: it has more, is no regular file, or no text.
      OSError: the system does not let us.
    """
    return _decoded(read_bytes(path, most))


def read_json(path: str | os.PathLike[str], most: int = 2**20) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
      path: of the file.
      most: bytes that it may have.

    Raises:
      UnreadableError: there is none, or one beyond the limits.
      OSError: the system does not let us.
    """
    content = parse_json(read_bytes(path, most))
    if not isinstance(content, dict):
        raise UnreadableError("holds no JSON object")
    return content


def parse_json(content: bytes) -> Any:
    """JSON of limited depth, whose whole numbers have at most 19 digits; NaN and Infinity are read.

    Raises:
      UnreadableError: it is none, or beyond these limits.
    """
    text = _decoded(content)
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise UnreadableError(f"is nested more than {_DEEPEST} deep") from None
    except ValueError as error:
        raise UnreadableError(f"is no JSON: {error}") from error
    # Every level needs a bracket, which is quicker to count.
    if text.count("[") + text.count("{") > _DEEPEST and _depth(value) > _DEEPEST:
        raise UnreadableError(f"is nested more than {_DEEPEST} deep")
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a number, which true and false are not."""
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
    """Refuses what would not fit into memory before any of it is taken.

    Args:
      needed: bytes.

    Raises:
      UnreadableError: there are fewer.
    """
    free = _free_memory()
    if needed > free:
        raise UnreadableError(f"takes {needed / 1e9:,.1f} GB of memory, of {free / 1e9:,.1f} free")


def _free_memory() -> int:
    """Bytes that can be had, as far as Linux says: of the machine, and of our container."""
    free = 2**63
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kilobytes = {words[0]: int(words[1]) for words in lines}
        free = 1024 * (kilobytes["MemAvailable:"] + kilobytes["SwapFree:"])
        # "max" where nobody set a limit.
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError, KeyError, IndexError):
        pass
    return free
