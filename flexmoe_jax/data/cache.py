"""A folder of arrays that are slow to make, so that they are made once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from absl import logging

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
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if str(file[_FINGERPRINT]) != fingerprint:
                return None
            return {name: file[name] for name in file.files if name != _FINGERPRINT}
    except Exception:  # Damage shows in many ways, and each has the same remedy: build again.
        return None


def _write(path: Path, fingerprint: str, arrays: Arrays) -> None:
    """Writes beside `path` and then moves into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **{_FINGERPRINT: np.array(fingerprint)}, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
