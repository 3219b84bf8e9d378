"""A folder of arrays that are slow to make, so that they are made once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from absl import logging

from flexmoe_jax.npz import open_npz
from flexmoe_jax.reading import UnreadableError

Arrays = Mapping[str, np.ndarray]

_FINGERPRINT = "fingerprint"


def default_folder() -> Path:
    """Returns `$XDG_CACHE_HOME/flexmoe_jax`, or `~/.cache/flexmoe_jax` when it is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "flexmoe_jax"


def cached(path: Path, fingerprint: str, build: Callable[[], Arrays]) -> Arrays:
    """Returns the arrays kept at `path`, or builds them and keeps them there.

    A file that is missing, damaged (every array carries a CRC-32) or made from other data (another
    fingerprint) is replaced without a word. The replacement is atomic, so that two runs that start
    together never read half a file. A folder that cannot be written costs time, not the run.

    Args:
      path: the cache file, `.npz`.
      fingerprint: identity of what the arrays are made from.
      build: makes the arrays; none of them holds Python objects.

    Returns:
      The arrays by name.
    """
    kept = _read(path, fingerprint)
    if kept is not None:
        return kept
    arrays = build()
    try:
        _write(path, fingerprint, arrays)
    except OSError as error:
        logging.log_first_n(
            logging.WARNING,
            "The decoded images are not cached, so the next run decodes them again: %s",
            1,
            error,
        )
    return arrays


def _read(path: Path, fingerprint: str) -> Arrays | None:
    """Returns the arrays at `path`, or None when they cannot be used."""
    try:
        with open_npz(path) as file:
            made_from, *names = file.read(_FINGERPRINT).ravel().tolist()
            if made_from != fingerprint or {_FINGERPRINT, *names} != set(file.names):
                return None
            return {name: file.read(name) for name in names}
    except (OSError, UnreadableError, KeyError, ValueError):
        return None  # Whatever it is, the remedy is the same: build again.


def _write(path: Path, fingerprint: str, arrays: Arrays) -> None:
    """Writes beside `path` and then moves into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            # With the names, so that an array that got lost is missed.
            known = np.array([fingerprint, *arrays])
            np.savez(file, allow_pickle=False, **{_FINGERPRINT: known}, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
