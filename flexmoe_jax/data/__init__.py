"""Data sets, their partitions over clients, and the clients' data on the device."""

from __future__ import annotations

from flexmoe_jax.data.augment import AUGMENTATIONS, Augmentation, crop, crop_flip, flip
from flexmoe_jax.data.clients import (
    ClientData,
    Feed,
    build_clients,
    feed_cohorts,
    label_counts,
)
from flexmoe_jax.data.partition import PARTITIONS, check, partition, skewed
from flexmoe_jax.data.partitioners import Partitioner, dirichlet, iid, k_class, natural, shards
from flexmoe_jax.data.sources import Dataset, load

__all__ = [
    "AUGMENTATIONS",
    "PARTITIONS",
    "Augmentation",
    "ClientData",
    "Dataset",
    "Feed",
    "Partitioner",
    "build_clients",
    "check",
    "crop",
    "crop_flip",
    "dirichlet",
    "feed_cohorts",
    "flip",
    "iid",
    "k_class",
    "label_counts",
    "load",
    "natural",
    "partition",
    "shards",
    "skewed",
]
