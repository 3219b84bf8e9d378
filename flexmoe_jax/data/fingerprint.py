"""What tells two data sets apart, wherever they lie."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from flexmoe_jax.data.sources import Dataset

# Of a data set, but not part of what is learnt from it.
_ASIDE = ("name", "notes")


def fingerprint(dataset: Dataset) -> dict[str, str]:
    """Hashes of all that a run is trained and tested on: array name to BLAKE2b.

    A data set gives the same hashes from whichever path, archive or cache it was read; a fifth of a
    second for CIFAR-10's 184 MB.
    """
    parts = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)}
    return {
        name: digest(np.asarray(part))
        for name, part in parts.items()
        if name not in _ASIDE and part is not None
    }


def digest(array: np.ndarray) -> str:
    """Hash of an array's type, shape and values, whatever its layout in memory."""
    # One byte order on every machine; texts as wide as the longest.
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    head = f"{plain.dtype.str}{array.shape}".encode()
    found = hashlib.blake2b(head, digest_size=16)
    found.update(plain.reshape(-1).view(np.uint8).data if plain.size else b"")
    return found.hexdigest()
