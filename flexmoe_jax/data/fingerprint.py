"""Hashes that identify the contents of a data set, independent of where it is stored."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from flexmoe_jax.data.sources import Dataset

# Fields of a data set that do not affect training or testing.
_ASIDE = ("name", "notes")


def fingerprint(dataset: Dataset) -> dict[str, str]:
    """Hash everything that a run trains and tests on: array name to BLAKE2b hash.

    The hashes do not depend on the path, archive or cache that the data set was read from. Hashing
    the 184 MB of CIFAR-10 takes a fifth of a second.
    """
    parts = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)}
    return {
        name: digest(np.asarray(part))
        for name, part in parts.items()
        if name not in _ASIDE and part is not None
    }


def digest(array: np.ndarray) -> str:
    """Hash an array's type, shape and values, independent of its memory layout."""
    # The byte order is the same on every machine. Strings are as wide as the longest one.
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    head = f"{plain.dtype.str}{array.shape}".encode()
    found = hashlib.blake2b(head, digest_size=16)
    found.update(plain.reshape(-1).view(np.uint8).data if plain.size else b"")
    return found.hexdigest()
