"""Check the metadata of a prepared data set before TFDS reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flexmoe_jax.reading import UnreadableError, read_bytes, read_json

_MOST_BYTES = 2**26  # size limit for a file of metadata or class names
_TFDS = "tensorflow_datasets."


def check_metadata(version_folder: Path) -> None:
    """Check that TFDS can read the metadata safely.

    Metadata are rejected if a file is too large, or if they would make TFDS import TensorFlow or a
    module outside TFDS.

    Raises:
      UnreadableError: if the metadata are rejected; names the problem.
    """
    for path in sorted(version_folder.glob("*.txt")):
        read_bytes(path, _MOST_BYTES)
    read_json(version_folder / "dataset_info.json", _MOST_BYTES)
    nodes: list[Any] = [read_json(version_folder / "features.json", _MOST_BYTES)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            _check_feature(node)
        if isinstance(node, dict | list):
            nodes += node.values() if isinstance(node, dict) else node


def _check_feature(node: dict[str, Any]) -> None:
    kind, dtype = str(node.get("pythonClassName", _TFDS)), str(node.get("dtype", "string"))
    if not kind.startswith(_TFDS):
        raise UnreadableError(f"features.json names {kind}, which is no feature of TFDS")
    try:
        np.dtype("O" if dtype == "string" else dtype)
    except TypeError:
        raise UnreadableError(f"features.json names {dtype}, which is no type") from None
