"""The training examples and who owns them, as one pytree for the device."""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.data.sources import Dataset
from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Array


@flax.struct.dataclass
class ClientData:
    """All clients' training data: the images once, and each client's rows of them.

    Attributes:
      images: (M, height, width, channels) uint8.
      labels: (M,) int32.
      index: (C, N) int32, each client's rows of `images`, padded with 0 to the largest client, and
        beyond it by at most an eighth: partitions of like sizes have one N and one program.
      size: (C,) int32, how many entries of its row of `index` are a client's own.
      label_share: (C, Y) float32, the share of each class among a client's examples.
    """

    images: Array
    labels: Array
    index: Array
    size: Array
    label_share: Array


def build_clients(dataset: Dataset, parts: Sequence[np.ndarray]) -> ClientData:
    """Puts the training examples and a partition of them on the device.

    Args:
      dataset: where the training images and labels come from.
      parts: for each of the C clients, its positions in the training examples.

    Returns:
      The clients' data.

    Raises:
      InputError: for no clients, or a client without examples.
    """
    sizes = np.array([len(part) for part in parts], np.int32)
    if sizes.size == 0 or sizes.min() == 0:
        empty = (
            "no clients" if sizes.size == 0 else f"client {int(sizes.argmin())} without examples"
        )
        raise InputError("parts", empty, "give at least one example to each of one or more clients")
    index = np.zeros((len(parts), _round_up(sizes.max())), np.int32)
    index[np.arange(index.shape[1]) < sizes[:, None]] = np.concatenate(list(parts))
    counts = label_counts(dataset.train_labels, parts, dataset.num_classes)
    return ClientData(
        images=jnp.asarray(dataset.train_images),
        labels=jnp.asarray(dataset.train_labels, jnp.int32),
        index=jnp.asarray(index),
        size=jnp.asarray(sizes),
        label_share=jnp.asarray(counts / sizes[:, None], jnp.float32),
    )


def _round_up(size: int) -> int:
    """The next number of four binary digits and zeros, at most an eighth above."""
    grain = 1 << max(int(size).bit_length() - 4, 0)
    return -(-int(size) // grain) * grain


def label_counts(labels: np.ndarray, parts: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Counts each client's examples of each class.

    Args:
      labels: (M,) int in [0, Y).
      parts: for each of the C clients, its positions in `labels`.
      num_classes: Y.

    Returns:
      (C, Y) int64.
    """
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    rows = np.concatenate([np.zeros(0, np.int64), *parts])
    cells = owner * num_classes + labels[rows]
    return np.bincount(cells, minlength=len(parts) * num_classes).reshape(-1, num_classes)
