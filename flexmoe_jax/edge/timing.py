"""Simulate the duration of a round, the clients that deliver, and the work that they do.

Times are simulated from the profiles of network and devices. They are not times of this program.

Axis legend: `C` clients, `P` clients of the round's cohort.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexmoe_jax.edge.devices import Devices
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.edge import EdgeOptions


class Attempt(NamedTuple):
    """The time that each client of a cohort needs if nothing goes wrong.

    Attributes:
      download: (P,) seconds.
      compute: (P,) seconds of local training.
      upload: (P,) seconds.
    """

    download: np.ndarray
    compute: np.ndarray
    upload: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Seconds from the start of the round to the end of the upload, (P,)."""
        total: np.ndarray = self.download + self.compute + self.upload
        return total


class Outcome(NamedTuple):
    """The outcome of a round.

    Attributes:
      work: (P,) share of its local work that each client did and delivered, in [0, 1]; 0 without
        delivery.
      delivered: (P,) bool, clients whose update the server accepted.
      reached: (P,) bool, clients that were sent the download; the others dropped out before.
      seconds: seconds from the start of the round to its end.
    """

    work: np.ndarray
    delivered: np.ndarray
    reached: np.ndarray
    seconds: float


def attempt(
    devices: Devices,
    cohort: np.ndarray,
    *,
    bytes_down: np.ndarray,
    bytes_up: np.ndarray,
    examples: np.ndarray,
) -> Attempt:
    """Compute the times of a cohort: bytes / link speed, examples / training speed.

    Args:
      devices: devices of all C clients.
      cohort: (P,) client ids.
      bytes_down: (P,) bytes that each client downloads.
      bytes_up: (P,) bytes that each client uploads.
      examples: (P,) examples that each client trains on, counted once for every epoch.

    Returns:
      The seconds of each stage, (P,).
    """
    return Attempt(
        download=np.asarray(bytes_down) / devices.down[cohort],
        compute=np.asarray(examples) / devices.speed[cohort],
        upload=np.asarray(bytes_up) / devices.up[cohort],
    )


def run_attempt(
    attempt: Attempt,
    *,
    wanted: int,
    deadline: float,
    late: str,
    dropped_before: np.ndarray,
    dropped_during: np.ndarray,
    steps: np.ndarray | None = None,
    turn: np.ndarray | None = None,
) -> Outcome:
    """Simulate a round: what each client delivers, and when the round ends.

    - *Dropped before*: the server knows at once and does not wait for the client.
    - *Dropped during*: the client trains, and then fails at the upload. The server cannot tell it
      from a slow client, so it waits until the deadline. Without a deadline, it learns of the loss
      when the upload would have ended.
    - *Late* (total time beyond the deadline): with `drop` the client delivers nothing. With
      `partial` it stops training early enough to deliver at the deadline, unless it has no time
      for a single step.
    - *Over-selection* (Bonawitz et al. 2019, arXiv 1902.01046): the `wanted` fastest clients are
      accepted, and the round ends with the last of them. The rest is lost.

    Args:
      attempt: times of the cohort.
      wanted: deliveries after which the round ends, at least 1; P or more to wait for all.
      deadline: seconds after which the round ends, above 0; `inf` for none.
      late: `drop` or `partial`.
      dropped_before: (P,) bool.
      dropped_during: (P,) bool.
      steps: (P,) local steps of a client's whole work; None if work can be divided at will.
      turn: (P,) in increasing order, who is first of the equally fast; None: as in the cohort.

    Returns:
      The outcome. The round ends with the last accepted delivery or, if there are too few, when the
      server stops waiting for the others.

    Raises:
      InputError: if `late` is unknown, or a number is out of range.
    """
    EdgeOptions.check(late=late)
    if wanted < 1:
        raise InputError("edge.wanted", wanted, "give at least 1")
    if not deadline > 0:
        raise InputError("edge.deadline", deadline, "give seconds above 0 (inf for none)")
    total = attempt.total
    reached = ~np.asarray(dropped_before, bool)
    possible = _possible_work(attempt, deadline, late, steps)
    end = np.minimum(total, deadline)
    able = reached & ~np.asarray(dropped_during, bool) & (possible > 0)
    delivered = _first(np.where(able, end, np.inf), turn, wanted) & able
    awaited = delivered if delivered.sum() == wanted else reached
    # For a client that delivers nothing, the server waits until the deadline.
    until = np.where(able | np.isinf(deadline), end, deadline)
    return Outcome(
        work=np.where(delivered, possible, 0.0),
        delivered=delivered,
        reached=reached,
        seconds=float(np.max(until, where=awaited, initial=0.0)),
    )


def _first(end: np.ndarray, turn: np.ndarray | None, wanted: int) -> np.ndarray:
    """Return (P,) bool, the `wanted` that end first; see `run_attempt` for `turn`."""
    order = np.lexsort((np.arange(len(end)) if turn is None else turn, end))
    first = np.zeros(len(end), bool)
    first[order[:wanted]] = True
    return first


def _possible_work(
    attempt: Attempt, deadline: float, late: str, steps: np.ndarray | None
) -> np.ndarray:
    """Return (P,), the share of its training that each client can do before the deadline."""
    possible = np.where(attempt.total <= deadline, 1.0, 0.0)
    if late == "partial":
        left = np.maximum(deadline - attempt.download - attempt.upload, 0.0)
        cut = (attempt.total > deadline) & (left > 0)
        np.divide(left, np.maximum(attempt.compute, left), out=possible, where=cut)
    if steps is None:
        return possible
    # No time for a single step is no time.
    return np.where(np.floor(possible * steps + 1e-9) > 0, possible, 0.0)
