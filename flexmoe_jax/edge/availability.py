"""Who can be reached in a round.

An `Availability` answers for any round, in any order, always alike: a run that is resumed sees what
it would have seen. There may be rounds in which nobody can be reached.

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
"""Round index -> (C,) bool: who can be reached."""

# Keeps these draws apart from others of the same seed and round.
_STREAM = 0xA7A11
AVAILABILITIES = ("always", "independent", "markov")
# Of a file of numbers as text: 10,000 rounds of 50,000 clients.
_MOST_BYTES = 2**30


def always(clients: int) -> Availability:
    """Everybody can be reached in every round.

    Args:
      clients: C.
    """
    return lambda round_index: np.ones(clients, bool)


def independent(share: np.ndarray, seed: int) -> Availability:
    """Each client is there with its own probability, whatever was before.

    Args:
      share: (C,) probabilities in [0, 1].
      seed: of the draws.

    Raises:
      InputError: a share outside [0, 1].
    """
    share = _check_share(share)
    return lambda round_index: _uniform(seed, round_index, len(share)) < share


def markov(share: np.ndarray, mean_on_rounds: float, seed: int) -> Availability:
    """Each client comes and goes by a chain of two states, so that it stays for a while.

    A client that is there leaves with probability l, and one that is away comes with probability c.
    As many come as go, π l = (1 - π) c, so that it is there in a share π of rounds, round 0 already
    included. It stays 1/l rounds on average: `mean_on_rounds`, or π / (1 - π) where that is more,
    since even one that is never away for two rounds on end cannot stay less.

    Rounds asked for in order cost O(C) each; one that lies back costs as much as all before it.

    Args:
      share: (C,) stationary probabilities π in [0, 1]; 0 is never there and 1 always.
      mean_on_rounds: at least 1.
      seed: of the draws.

    Raises:
      InputError: a share outside [0, 1], or a stay below 1.
    """
    share = _check_share(share)
    EdgeOptions.check(mean_on_rounds=mean_on_rounds)
    turnover = np.minimum(share / mean_on_rounds, 1 - share)
    leave = np.divide(turnover, share, out=np.zeros_like(share), where=share > 0)
    come = np.divide(turnover, 1 - share, out=np.zeros_like(share), where=share < 1)
    latest: tuple[int, np.ndarray] | None = None

    def there(round_index: int) -> np.ndarray:
        # The last answer is kept to go on from; one tuple, so that threads see whole answers.
        nonlocal latest
        if latest is not None and latest[0] <= round_index:
            known, state = latest
        else:
            known, state = 0, _uniform(seed, 0, len(share)) < share
        for index in range(known + 1, round_index + 1):
            state = _uniform(seed, index, len(share)) < np.where(state, 1 - leave, come)
        latest = round_index, state
        return state.copy()

    return there


def trace(source: str | Path | np.ndarray, clients: int) -> Availability:
    """Plays a record of who was there; past its end it begins again.

    Args:
      source: (T, C) of 0 and 1, rounds down and clients across: an array, a `.npy` file, or a file
        of comma-separated values without a header.
      clients: C.

    Raises:
      InputError: a record that cannot be read, is empty, or has other values or another width.
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
    """Makes the availability of a name.

    Args:
      name: `always`, `independent`, `markov`, or the path of a trace.
      share: (C,) share of rounds in which each client is there; a trace takes only C from it.
      mean_on_rounds: of `markov`.
      seed: of the draws.

    Raises:
      InputError: neither a name nor a file, or what the availability itself refuses.
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
    except (OSError, ValueError):  # Longer than any name, or with a zero in it.
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
    """Reads the array that a file for `trace` holds, whether or not it can be one.

    Args:
      path: of a `.npy` file, or of comma-separated numbers without a header.

    Raises:
      InputError: it cannot be read as either.
    """
    given = Path(os.path.expanduser(path))
    try:
        if given.suffix == ".npy":
            return read_npy(given)
        text = read_text(given, _MOST_BYTES)
        # As numbers they take eight bytes each, of which most are written as two.
        require_memory(8 * len(text))
        lines = [line for line in text.splitlines() if line.partition("#")[0].strip()]
        return np.loadtxt(lines, delimiter=",", ndmin=2) if lines else np.empty((0, 0))
    except (OSError, ValueError) as error:  # ValueError: unreadable, or no numbers
        reason = str(error).partition("\n")[0]
        remedy = f"give 0 and 1 in a .npy file, or comma-separated without a header ({reason})"
        raise InputError("edge.availability", path, remedy) from error
