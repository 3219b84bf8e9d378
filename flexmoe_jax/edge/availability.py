"""Availability: which clients can be reached in a round.

An `Availability` gives the same answer for a round in whatever order rounds are asked, so a resumed
run sees the same clients as an uninterrupted one. In some rounds, no client may be available.

Axis legend: `C` clients, `T` rounds.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flexmoe_jax.errors import InputError
from flexmoe_jax.npz import read_npy
from flexmoe_jax.options.edge import EdgeOptions
from flexmoe_jax.reading import read_text, require_memory

Availability = Callable[[int], np.ndarray]
"""Round index -> (C,) bool: clients that can be reached."""

# Separates these draws from others of the same seed and round.
_STREAM = 0xA7A11
AVAILABILITIES = ("always", "independent", "markov")
# Size limit for a text file of numbers: 10,000 rounds of 50,000 clients.
_MOST_BYTES = 2**30


def always(clients: int) -> Availability:
    """All clients can be reached in every round.

    Args:
      clients: C.
    """
    return lambda round_index: np.ones(clients, bool)


def independent(share: np.ndarray, seed: int) -> Availability:
    """Each client is available with its own probability, independently in every round.

    Args:
      share: (C,) probabilities in [0, 1].
      seed: seed of the draws.

    Raises:
      InputError: if a share is outside [0, 1].
    """
    share = _check_share(share)
    return lambda round_index: _uniform(seed, round_index, len(share)) < share


def markov(share: np.ndarray, mean_on_rounds: float, seed: int) -> Availability:
    """The availability of each client is a two-state Markov chain, so that it persists for a while.

    An available client leaves with probability l, and an unavailable client returns with
    probability c. The chain is stationary from round 0: π l = (1 - π) c, so a client is available
    in a share π of rounds. It stays available for 1/l rounds on average. This is `mean_on_rounds`,
    or π / (1 - π) if that is more: at c = 1, the client is never unavailable for two rounds in a
    row, and a shorter mean would contradict π.

    Rounds asked in increasing order cost O(C) each. An earlier round costs as much as all rounds
    up to it.

    Args:
      share: (C,) stationary probabilities π in [0, 1]; 0 is never available and 1 always.
      mean_on_rounds: mean number of rounds that a client stays available, at least 1.
      seed: seed of the draws.

    Raises:
      InputError: if a share is outside [0, 1], or `mean_on_rounds` is below 1.
    """
    share = _check_share(share)
    EdgeOptions.check(mean_on_rounds=mean_on_rounds)
    turnover = np.minimum(share / mean_on_rounds, 1 - share)
    leave = np.divide(turnover, share, out=np.zeros_like(share), where=share > 0)
    come = np.divide(turnover, 1 - share, out=np.zeros_like(share), where=share < 1)
    latest: tuple[int, np.ndarray] | None = None

    def there(round_index: int) -> np.ndarray:
        # Continue from the last answer. It is one tuple and is read once: threads may replace it.
        nonlocal latest
        last = latest
        if last is not None and last[0] <= round_index:
            known, state = last
        else:
            known, state = 0, _uniform(seed, 0, len(share)) < share
        for index in range(known + 1, round_index + 1):
            state = _uniform(seed, index, len(share)) < np.where(state, 1 - leave, come)
        latest = round_index, state
        return state.copy()

    return there


def trace(source: str | Path | np.ndarray, clients: int) -> Availability:
    """Replay a record of which clients were available; after its end it starts again.

    Args:
      source: (T, C) of 0 and 1, one row for each round and one column for each client: an array, a
        `.npy` file, or a file of comma-separated values without a header.
      clients: C.

    Raises:
      InputError: if the record cannot be read, is empty, or has other values or another width.
    """
    label = f"array of shape {source.shape}" if isinstance(source, np.ndarray) else str(source)
    record = source if isinstance(source, np.ndarray) else read_record(source)
    if record.ndim != 2 or not record.size or record.dtype.kind not in "biuf":
        raise InputError(
            "edge.availability", label, "give numbers, a row a round and a column a client"
        )
    if record.shape[1] != clients:
        remedy = f"it has {record.shape[1]} columns; give one for each of the {clients} clients"
        raise InputError("edge.availability", label, remedy)
    if not np.isin(record, (0, 1)).all():
        raise InputError("edge.availability", label, "give 0 (away) or 1 (there) everywhere")
    there = record.astype(bool)
    return lambda round_index: there[round_index % len(there)].copy()


def make_availability(
    name: str, *, share: np.ndarray, mean_on_rounds: float, seed: int
) -> Availability:
    """Make an availability by name.

    Args:
      name: `always`, `independent`, `markov`, or the path of a trace.
      share: (C,) share of rounds in which each client is available; a trace uses only C from it.
      mean_on_rounds: see `markov`.
      seed: seed of the draws.

    Raises:
      InputError: if `name` is neither a name nor a file, or the availability rejects its arguments.
    """
    if name == "always":
        return always(len(share))
    if name == "independent":
        return independent(share, seed)
    if name == "markov":
        return markov(share, mean_on_rounds, seed)
    if not _is_file(name):
        near = difflib.get_close_matches(name, AVAILABILITIES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        remedy = f"{hint}give {', '.join(AVAILABILITIES)} or the path of a trace"
        raise InputError("edge.availability", name, remedy)
    return trace(name, len(share))


def _is_file(name: str) -> bool:
    try:
        return Path(os.path.expanduser(name)).is_file()
    except (OSError, ValueError):  # The name is too long, or contains a null character.
        return False


def _uniform(seed: int, round_index: int, clients: int) -> np.ndarray:
    return np.random.default_rng([seed, _STREAM, round_index]).random(clients)


def _check_share(share: np.ndarray) -> np.ndarray:
    share = np.asarray(share, np.float64)
    outside = ~((share >= 0) & (share <= 1))
    if outside.any():
        raise InputError("edge.share", share[outside][0], "give a share of rounds, from 0 to 1")
    return share


def read_record(path: str | Path) -> np.ndarray:
    """Read the array in a file for `trace`, without checking that it is a valid trace.

    Args:
      path: path of a `.npy` file, or of a file of comma-separated numbers without a header.

    Raises:
      InputError: if the file cannot be read as either.
    """
    given = Path(os.path.expanduser(path))
    try:
        if given.suffix == ".npy":
            return read_npy(given)
        text = read_text(given, _MOST_BYTES)
        # A number takes eight bytes in memory, but usually only two as text.
        require_memory(8 * len(text))
        lines = [line for line in text.splitlines() if line.partition("#")[0].strip()]
        return np.loadtxt(lines, delimiter=",", ndmin=2) if lines else np.empty((0, 0))
    except (OSError, ValueError) as error:  # ValueError: unreadable, or not numbers
        reason = str(error).partition("\n")[0]
        remedy = f"give 0 and 1 in a .npy file, or comma-separated without a header ({reason})"
        raise InputError("edge.availability", path, remedy) from error
