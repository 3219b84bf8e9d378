"""Data sets, partitions of them over clients, and the clients' data on the device."""

from __future__ import annotations

from flexmoe_jax.data.augment import AUGMENTATIONS, Augmentation, crop, crop_flip, flip
from flexmoe_jax.data.clients import (
    About,
    ClientData,
    Feed,
    build_clients,
    client_numbers,
    draw_newcomers,
    feed_cohorts,
    join,
    label_counts,
)
from flexmoe_jax.data.fingerprint import digest, fingerprint
from flexmoe_jax.data.partition import PARTITIONS, check, partition, skewed
from flexmoe_jax.data.partitioners import Partitioner, dirichlet, iid, k_class, natural, shards
from flexmoe_jax.data.rules import Ruled, follow_rules
from flexmoe_jax.data.sources import Dataset, is_pictures, load, load_corpus
from flexmoe_jax.data.standardise import Standardisation, doubts, standardise
from flexmoe_jax.data.text import (
    TEXT,
    TOPICS,
    Corpus,
    Dealt,
    deal_domains,
    python_topics,
    read_corpus,
)
from flexmoe_jax.options.data import DataOptions, PartitionOptions

__all__ = [
    "AUGMENTATIONS",
    "PARTITIONS",
    "TEXT",
    "TOPICS",
    "About",
    "Augmentation",
    "ClientData",
    "Corpus",
    "DataOptions",
    "Dataset",
    "Dealt",
    "Feed",
    "PartitionOptions",
    "Partitioner",
    "Ruled",
    "Standardisation",
    "build_clients",
    "check",
    "client_numbers",
    "crop",
    "crop_flip",
    "deal_domains",
    "digest",
    "dirichlet",
    "doubts",
    "draw_newcomers",
    "feed_cohorts",
    "fingerprint",
    "flip",
    "follow_rules",
    "iid",
    "is_pictures",
    "join",
    "k_class",
    "label_counts",
    "load",
    "load_corpus",
    "natural",
    "partition",
    "python_topics",
    "read_corpus",
    "shards",
    "skewed",
    "standardise",
]
