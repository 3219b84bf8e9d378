"""Cache arrays that are slow to compute in a folder."""

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
    """Return `$XDG_CACHE_HOME/flexmoe_jax`, or `~/.cache/flexmoe_jax` if it is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "flexmoe_jax"


def cached(path: Path, fingerprint: str, build: Callable[[], Arrays]) -> Arrays:
    """Return the arrays cached at `path`, or build them and write them there.

    A file is silently replaced if it is missing, damaged (every array has a CRC-32) or made from
    other data (the fingerprint differs). The replacement is atomic, so two runs that start together
    never read half a file. If the folder cannot be written, the run continues without a cache.

    Args:
      path: the cache file, `.npz`.
      fingerprint: identifies the data that the arrays are made from.
      build: makes the arrays; they must not hold Python objects.

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
    """Return the arrays at `path`, or None if they cannot be used."""
    try:
        with open_npz(path) as file:
            made_from, *names = file.read(_FINGERPRINT).ravel().tolist()
            if made_from != fingerprint or {_FINGERPRINT, *names} != set(file.names):
                return None
            return {name: file.read(name) for name in names}
    except (OSError, UnreadableError, KeyError, ValueError):
        return None  # For every error the remedy is the same: build again.


def _write(path: Path, fingerprint: str, arrays: Arrays) -> None:
    """Write a temporary file next to `path`, and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            # The file also lists the names of its arrays, so that a lost array is detected.
            known = np.array([fingerprint, *arrays])
            np.savez(file, allow_pickle=False, **{_FINGERPRINT: known}, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
