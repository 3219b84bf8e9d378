"""metrics.jsonl: one JSON object a round, read line by line, whatever became of the file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flexmoe_jax.reading import UnreadableError, open_regular, parse_json

Metrics = dict[str, Any]

# Bytes of the file, enough for half a million rounds of 64 experts, and of a line.
_MOST_BYTES, _LONGEST_LINE = 2**30, 2**24
_MOST_ROUNDS = 2**31 - 1


class History(NamedTuple):
    """The rounds that a run recorded.

    Attributes:
      rows: rising in `round`, one for each round that can be read.
      unread: whole lines that cannot, or tell a round out of order.
      repeated: lines of rounds that a later line tells again, which counts.
    """

    rows: tuple[Metrics, ...] = ()
    unread: int = 0
    repeated: int = 0

    @property
    def last(self) -> int:
        """Number of the last round that can be read, 0 for none."""
        return int(self.rows[-1]["round"]) if self.rows else 0


def read_history(path: Path, most_rounds: object = None) -> History:
    """Reads metrics.jsonl; a file that is not there has no rounds.

    The end of the last line may be missing: a process was killed, or is still writing.

    Args:
      path: of the file.
      most_rounds: of the run, where that is known; what claims to be of a later round is damaged.

    Raises:
      UnreadableError: it is no file of that kind, or too large.
      OSError: the system does not let us.
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
    """Whether an assignment of this status was dealt out, since no solver answered in time."""
    return status.startswith("fallback")


def missing_rounds(rows: Sequence[Metrics], last: int) -> int:
    """How many of the rounds 1 to `last` are not among the rows."""
    return last - sum(row["round"] <= last for row in rows)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines that are not blank; of one that is too long only its end, which is no JSON."""
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
    """Whether the lines around a row say that its number is wrong."""
    if before is None or row is None or after is None:
        return False
    expected = before["round"] + 1
    return bool(row["round"] != expected and after["round"] == expected + 1)
