"""The clients' training examples as one pytree, for all clients or for one cohort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.data.sources import Dataset
from flexmoe_jax.errors import InputError, check_range
from flexmoe_jax.types import Array, PyTree


class About(NamedTuple):
    """Facts about all clients that evaluation needs.

    Attributes:
      label_share: (C, Y) float32, see `ClientData`.
      owns: (C, F) bool, the groups of test examples (for example domains) that belong to each
        client. None if there is one group for each client, with the client's number.
    """

    label_share: Array
    owns: Array | None = None


@flax.struct.dataclass
class ClientData:
    """Training examples of all clients: every array once, and an index of each client's rows.

    Attributes:
      arrays: named examples, leaves (M, ...): `images` and `labels`, or `tokens`, or any others.
      index: (C, N) int32, each client's rows in the arrays, padded with 0. N is the size of the
        largest client, rounded up by at most an eighth, so that partitions of similar sizes have
        the same N and share one compiled program.
      size: (C,) int32, number of entries in each row of `index` that are not padding.
      label_share: (C, Y) float32, the share of each class among a client's examples; Y = 0 if
        examples have no class.
      owns: (C, F) bool, see `About`.
    """

    arrays: dict[str, Array]
    index: Array
    size: Array
    label_share: Array
    owns: Array | None = None

    @property
    def about(self) -> About:
        """The facts about the clients that evaluation needs."""
        return About(self.label_share, self.owns)

    def of(self, numbers: np.ndarray) -> ClientData:
        """Return the data of the clients `numbers` (c,), in this order; the arrays stay whole."""
        if not len(numbers):
            raise InputError("numbers", numbers, "name one client at least")
        size = self.size[numbers]
        return ClientData(
            arrays=self.arrays,
            index=self.index[numbers, : _round_up(int(size.max()))],
            size=size,
            label_share=self.label_share[numbers],
            owns=None if self.owns is None else self.owns[numbers],
        )

    def few(self, most: int, seed: int) -> ClientData:
        """Draw at most `most` examples of each client, and copy them to new arrays on the host.

        `label_share` and `owns` still describe all examples of the clients.
        """
        sizes = np.asarray(self.size)
        drawn = [
            np.asarray(self.index)[c, np.random.default_rng([seed, _FEW, c]).permutation(size)]
            for c, size in enumerate(sizes)
        ]
        rows = [part[:most] for part in drawn]
        ends = np.cumsum([0, *map(len, rows)])
        taken = np.concatenate(rows)
        parts = [np.arange(*pair) for pair in pairwise(ends)]
        arrays = {name: np.asarray(x)[taken] for name, x in self.arrays.items()}
        return join(arrays, parts, place=np.asarray).replace(  # type: ignore[attr-defined]
            label_share=self.label_share, owns=self.owns
        )


# Stream numbers of random draws: the choice of newcomers, and a few examples of each client.
_NEWCOMERS, _FEW = 0x4E3C, 0xFE3

Feed = Callable[[np.ndarray], ClientData]
"""Cohort of a round (P,) -> data that contain at least the examples of its clients."""


def build_clients(
    dataset: Dataset,
    parts: Sequence[np.ndarray],
    *,
    place: Callable[[np.ndarray], Any] = jnp.asarray,
) -> ClientData:
    """Join the training images and labels of a data set with a partition of them; see `join`."""
    arrays = {
        "images": dataset.train_images,
        "labels": np.asarray(dataset.train_labels, np.int32),
    }
    counts = label_counts(dataset.train_labels, parts, dataset.num_classes)
    return join(arrays, parts, counts, place=place)


def join(
    arrays: dict[str, np.ndarray],
    parts: Sequence[np.ndarray],
    counts: np.ndarray | None = None,
    owns: np.ndarray | None = None,
    place: Callable[[np.ndarray], Any] = jnp.asarray,
) -> ClientData:
    """Join named training examples with a partition of them.

    Args:
      arrays: leaves (M, ...).
      parts: for each of the C clients, the positions of its examples in the arrays.
      counts: (C, Y) examples of each class on each client: each example has one class. None if
        examples have no class.
      owns: (C, F) bool, groups of test examples that belong to each client; see `About`.
      place: moves an array to the device; with `np.asarray` it stays on the host.

    Returns:
      The clients' data.

    Raises:
      InputError: if there are no clients, a client has no examples, an array is not of numbers or
        not as long as the others, a position is outside the arrays, or `counts` or `owns` do not
        fit the clients.
    """
    sizes = np.array([len(part) for part in parts], np.int32)
    if sizes.size == 0 or sizes.min() == 0:
        empty = (
            "no clients" if sizes.size == 0 else f"client {int(sizes.argmin())} without examples"
        )
        raise InputError("parts", empty, "give at least one example to each of one or more clients")
    rows = np.concatenate([np.asarray(part) for part in parts])
    for name, values in arrays.items():
        kind = np.dtype(getattr(values, "dtype", None) or np.asarray(values).dtype)
        if not any(jnp.issubdtype(kind, known) for known in (jnp.number, jnp.bool_)):
            raise InputError(name, f"array of {kind}", "give numbers; classes are numbered from 0")
    _check_rows(rows, {name: len(values) for name, values in arrays.items()})
    index = np.zeros((len(parts), _round_up(sizes.max())), np.int32)
    index[np.arange(index.shape[1]) < sizes[:, None]] = rows
    counts = np.zeros((len(parts), 0)) if counts is None else np.asarray(counts)
    _check_counts(counts, sizes)
    if owns is not None and (np.ndim(owns) != 2 or len(owns) != len(parts)):
        remedy = f"give one row of groups for each of the {len(parts)} clients"
        raise InputError("owns", f"array {np.shape(owns)}", remedy)
    return ClientData(
        arrays={name: place(values) for name, values in arrays.items()},
        index=place(index),
        size=place(sizes),
        label_share=place(np.asarray(counts / sizes[:, None], np.float32)),
        owns=None if owns is None else place(np.asarray(owns, bool)),
    )


def _check_counts(counts: np.ndarray, sizes: np.ndarray) -> None:
    """Refuses class counts that are not those of each client's examples; no classes will do."""
    clients = len(sizes)
    if counts.ndim != 2 or len(counts) != clients:
        remedy = f"give one row of classes for each of the {clients} clients"
        raise InputError("counts", f"array {counts.shape}", remedy)
    wrong = (counts < 0).any(axis=1) | (counts.sum(axis=1) != sizes)
    if counts.shape[1] and wrong.any():
        client = int(wrong.argmax())
        remedy = f"its {sizes[client]} examples have one class each: see data.label_counts"
        raise InputError("counts", f"{counts[client].tolist()} of client {client}", remedy)


def _check_rows(rows: np.ndarray, lengths: dict[str, int]) -> None:
    if len(set(lengths.values())) != 1:
        raise InputError("arrays", lengths, "give every array one entry for each example")
    count = next(iter(lengths.values()))
    if not np.issubdtype(rows.dtype, np.integer):
        raise InputError("parts", rows.dtype, "give positions in the arrays: whole numbers")
    check_range("parts", rows, 0, count - 1, "positions in the arrays")


def feed_cohorts(
    data: ClientData, most: int, put: Callable[[PyTree], PyTree] = jax.device_put
) -> Feed:
    """Send examples to the device by cohort, if those of all clients do not fit on it.

    A round gives exactly the same result as with the data of all clients. If the next cohort is fed
    while the device still works on the previous round, its examples are ready when its round
    begins. The arrays of all cohorts have the same shapes, so they share one compiled program.

    Args:
      data: data of all clients, on the host: from `build_clients` with `place=np.asarray`.
      most: P, number of clients in the largest cohort.
      put: puts host arrays on the devices.

    Returns:
      The feed. Its data hold only the cohort's examples; `index` gives the rows among these. It
      raises `InputError` for a cohort of more clients than `most`.
    """
    room = int(np.sort(data.size)[::-1][:most].sum())
    known = put({"size": data.size, "label_share": data.label_share, "owns": data.owns})

    def feed(cohort: np.ndarray) -> ClientData:
        if len(cohort) > most:
            raise InputError("cohort", f"{len(cohort)} clients", f"the feed was made for {most}")
        owned = np.arange(data.index.shape[1]) < np.asarray(data.size)[cohort, None]  # (P, N)
        rows = np.asarray(data.index)[cohort][owned]
        place = np.zeros(owned.shape, np.int32)
        place[owned] = np.arange(rows.size)
        index = np.full(data.index.shape, -1, np.int32)  # Others have no examples here.
        index[cohort] = np.where(owned, place, -1)
        rows = np.resize(rows, room)
        sent = {"arrays": {name: x[rows] for name, x in data.arrays.items()}, "index": index}
        return ClientData(**put(sent), **known)

    return feed


def _round_up(size: int) -> int:
    """Round up to four significant binary digits, which adds at most an eighth."""
    grain = 1 << max(int(size).bit_length() - 4, 0)
    return -(-int(size) // grain) * grain


def draw_newcomers(clients: int, newcomers: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the newcomers: clients that do not train, and join after training.

    Args:
      clients: C, newcomers included.
      newcomers: number of newcomers.
      seed: seed of the draw.

    Returns:
      Numbers of the clients that train, and of the newcomers, both increasing.

    Raises:
      InputError: if `newcomers` is below 0, or no client is left to train.
    """
    if not 0 <= newcomers < clients:
        remedy = f"choose 0 to {clients - 1}: of {clients} clients at least one must train"
        raise InputError("clients.newcomers", newcomers, remedy)
    drawn = np.random.default_rng([seed, _NEWCOMERS]).permutation(clients)
    return np.sort(drawn[newcomers:]), np.sort(drawn[:newcomers])


def label_counts(labels: np.ndarray, parts: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Count each client's examples of each class.

    Args:
      labels: (M,) int in [0, Y).
      parts: for each of the C clients, the positions of its examples in `labels`.
      num_classes: Y.

    Returns:
      (C, Y) int64.

    Raises:
      InputError: if a label is outside [0, Y).
    """
    given = np.asarray(labels)
    check_range("labels", given, 0, num_classes - 1, "the numbers of the classes")
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    rows = np.concatenate([np.zeros(0, np.int64), *parts])
    cells = owner * num_classes + given[rows]
    return np.bincount(cells, minlength=len(parts) * num_classes).reshape(-1, num_classes)


def client_numbers(train_clients: np.ndarray, test_clients: np.ndarray) -> np.ndarray:
    """Return the client number of each test example's owner, for the partition `natural`.

    Args:
      train_clients: ids of the training examples' owners; clients are numbered by sorted id.
      test_clients: (M,) ids of the test examples' owners.

    Returns:
      (M,) int32 in [0, C), or -1 if the owner is not one of the clients.
    """
    ids = np.unique(train_clients)
    place = np.searchsorted(ids, test_clients).clip(max=len(ids) - 1)
    return np.where(ids[place] == test_clients, place, -1).astype(np.int32)
