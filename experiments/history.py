"""Reads metrics.jsonl, with one JSON object per round, line by line, even if it is damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flexmoe_jax.reading import UnreadableError, open_regular, parse_json

Metrics = dict[str, Any]

# Most bytes of the file, enough for half a million rounds of 64 experts, and of a line.
_MOST_BYTES, _LONGEST_LINE = 2**30, 2**24
_MOST_ROUNDS = 2**31 - 1


class History(NamedTuple):
    """The rounds that a run recorded.

    Attributes:
      rows: one row for each round that can be read, in rising order of `round`.
      unread: number of whole lines that cannot be read, or whose round is out of order.
      repeated: number of lines replaced by a later line for the same round.
    """

    rows: tuple[Metrics, ...] = ()
    unread: int = 0
    repeated: int = 0

    @property
    def last(self) -> int:
        """Number of the last round that can be read; 0 if there is none."""
        return int(self.rows[-1]["round"]) if self.rows else 0


def read_history(path: Path, most_rounds: object = None) -> History:
    """Reads metrics.jsonl; a missing file has no rounds.

    The last line may be incomplete: a process was killed, or is still writing.

    Args:
      path: path of the file.
      most_rounds: rounds of the run, if known; a line with a higher round counts as damaged.

    Raises:
      UnreadableError: it is not a regular file, or it is too large.
      OSError: the operating system denies access.
    """
    known = isinstance(most_rounds, int) and 0 < most_rounds < _MOST_ROUNDS
    most = most_rounds if isinstance(most_rounds, int) and known else _MOST_ROUNDS
    found: list[Metrics | None] = []
    torn = False
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > _MOST_BYTES:
                raise UnreadableError(f"is larger than the {_MOST_BYTES:,} bytes that are read")
            for line in _lines(file):
                row = _row(line, most)
                torn = row is None and not line.endswith(b"\n")
                if not torn:
                    found.append(row)
    except FileNotFoundError:
        return History()
    rows = [row for before, row, after in _neighbours(found) if not _misplaced(before, row, after)]
    by_round = {row["round"]: row for row in rows if row is not None}
    read = sum(row is not None for row in rows)
    ordered = tuple(by_round[number] for number in sorted(by_round))
    return History(ordered, unread=len(found) - read, repeated=read - len(by_round))


def fell_back(status: str) -> bool:
    """Returns whether the status says that no solver answered in time and a fallback was used."""
    return status.startswith("fallback")


def missing_rounds(rows: Sequence[Metrics], last: int) -> int:
    """Returns the number of rounds from 1 to `last` that are missing from the rows."""
    return last - sum(row["round"] <= last for row in rows)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields the lines that are not blank; of a line too long, only its end, which is not JSON."""
    while line := file.readline(_LONGEST_LINE):
        while len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            line = b"..." + file.readline(_LONGEST_LINE - 3)
        if line.strip():
            yield line


def _row(line: bytes, most: int) -> Metrics | None:
    try:
        row = parse_json(line)
    except UnreadableError:
        return None
    number = row.get("round") if isinstance(row, dict) else None
    fits = isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= most
    return row if fits else None


def _neighbours(
    rows: Sequence[Metrics | None],
) -> Iterator[tuple[Metrics | None, Metrics | None, Metrics | None]]:
    first: Metrics = {"round": 0}
    return zip([first, *rows], rows, [*rows[1:], None], strict=False)


def _misplaced(before: Metrics | None, row: Metrics | None, after: Metrics | None) -> bool:
    """Returns whether the lines before and after a row show that its number is wrong."""
    if before is None or row is None or after is None:
        return False
    expected = before["round"] + 1
    return bool(row["round"] != expected and after["round"] == expected + 1)
