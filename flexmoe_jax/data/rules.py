"""Rules that differ between clients: the same picture looks different or has a different label.

With a partition alone, clients differ only in which examples they have. With rules, they also
differ in the orientation of a picture (`turned`) or in its label (`relabelled`), so that no single
model is best for all clients. The numbers of clients that follow each rule differ by at most one,
and so do the numbers of test examples of each class.

Axis legend: `C` clients, `M` examples, `R` rules, `Y` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from flexmoe_jax.data.sources import Dataset
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.data import PartitionOptions

RULES = 4
"""R: pictures rotated by 0, 90, 180 or 270 degrees, or labels changed by one of R permutations."""

# Stream number of this random draw.
_DRAW = 0x2175


class Ruled(NamedTuple):
    """A data set whose examples follow rules.

    Attributes:
      dataset: the data set after the rules were applied.
      group: (M,) int32, group of each test example: rule · Y + class.
      owns: (C, R · Y) bool, the groups that each client trains on. The test examples of these
        groups belong to the client.
      ceiling: the highest accuracy on the test set that one model shared by all clients can reach;
        1 if a picture shows its rule (`turned`).
    """

    dataset: Dataset
    group: np.ndarray
    owns: np.ndarray
    ceiling: float


def follow_rules(
    options: PartitionOptions, dataset: Dataset, parts: Sequence[np.ndarray], seed: int
) -> Ruled:
    """Assign rules to the clients, and apply them to the training and test examples.

    Args:
      options: the kind of rules, and how many rules a client follows.
      dataset: the data set as read.
      parts: for each of the C clients, the positions of its training examples, increasing.
      seed: the same seed gives the same rules.

    Raises:
      InputError: if the pictures cannot be rotated, there are fewer classes than rules, or an
        option does not fit.
    """
    _check(options, dataset)
    rng = np.random.default_rng([seed, _DRAW])
    of_clients = deal_rules(len(parts), options.rules_per_client, rng)
    mixed = rng.permutation(len(dataset.test_labels))
    train = np.zeros(len(dataset.train_labels), np.int32)
    for part, followed in zip(parts, of_clients, strict=True):
        train[rng.permutation(part)] = np.resize(followed, len(part))
    # Rules alternate along the examples sorted by class: each rule gets equally many test examples
    # (±1), in all and of each class.
    test = np.empty(len(dataset.test_labels), np.int32)
    turn_of = np.argsort(dataset.test_labels[mixed], kind="stable")
    test[mixed[turn_of]] = np.arange(len(mixed)) % RULES
    order = rng.permutation(dataset.num_classes)
    if options.rule == "turned":
        changed = replace(
            dataset,
            train_images=turn(dataset.train_images, train),
            test_images=turn(dataset.test_images, test),
        )
    else:
        changed = replace(
            dataset,
            train_labels=relabel(dataset.train_labels, train, order),
            test_labels=relabel(dataset.test_labels, test, order),
        )
    classes = dataset.num_classes
    owns = np.zeros((len(parts), RULES * classes), bool)
    for own, part in zip(owns, parts, strict=True):
        own[train[part] * classes + changed.train_labels[part]] = True
    ceiling = 1.0
    if options.rule == "relabelled":
        ceiling = _agreement(dataset.test_labels, changed.test_labels)
    group = (test * classes + changed.test_labels).astype(np.int32)
    return Ruled(changed, group, owns, ceiling)


def deal_rules(clients: int, per_client: int, rng: np.random.Generator) -> np.ndarray:
    """Draw distinct rules for each client, (C, per_client) int; each rule equally often (±1)."""
    count, dealt = np.zeros(RULES, int), np.empty((clients, per_client), int)
    for client in rng.permutation(clients):
        dealt[client] = np.lexsort((rng.random(RULES), count))[:per_client]
        count[dealt[client]] += 1
    return dealt


def turn(images: np.ndarray, rule: np.ndarray) -> np.ndarray:
    """Rotate each image of (M, side, side, ...) by its rule (M,) times 90 degrees."""
    turned = images.copy()
    for times in range(1, RULES):
        chosen = rule == times
        turned[chosen] = np.rot90(images[chosen], times, axes=(1, 2))
    return turned


def relabel(labels: np.ndarray, rule: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Shift each label of (M,) by its rule (M,) along an order (Y,) of the classes.

    Two different rules never map a label to the same label.
    """
    place = np.argsort(order)
    moved = order[(place[labels] + rule) % len(order)]
    return np.asarray(moved, labels.dtype)


def _agreement(before: np.ndarray, after: np.ndarray) -> float:
    """Return the share of `after` that the best function of `before` predicts correctly."""
    pairs = np.stack([before, after])
    kinds, count = np.unique(pairs, axis=1, return_counts=True)
    most = [count[kinds[0] == label].max() for label in np.unique(before)]
    return float(np.sum(most) / len(before))


def _check(options: PartitionOptions, dataset: Dataset) -> None:
    name, shape = options.rule, dataset.image_shape
    if options.rules_per_client > RULES:
        remedy = f"there are {RULES} rules: choose 1 to {RULES}"
        raise InputError("partition.rules_per_client", options.rules_per_client, remedy)
    if options.name == "natural":
        remedy = "natural clients' examples are what they are: choose none, or another partition"
        raise InputError("partition.rule", name, remedy)
    if name == "turned" and not (len(shape) == 3 and shape[0] == shape[1]):
        remedy = f"examples of shape {shape} are no square pictures"
        raise InputError("partition.rule", name, remedy)
    if name == "relabelled" and dataset.num_classes < RULES:
        remedy = f"{RULES} rules need as many classes, and there are {dataset.num_classes}"
        raise InputError("partition.rule", name, remedy)
