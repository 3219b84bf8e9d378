"""Affinity under label skew: is it worth anything, if it does not take classes for kinds of data?

    python -m experiments.sweep --study=experiments/studies/affinity.py \
        --data_dir=TFDS_DIR --workdir=runs/affinity

TFDS_DIR holds `emnist/digits` and `cifar10` as TFDS prepares them (array_record). The setting is
that of `paper_small` with 4 classes a client. 24 runs; on one core those of digits take 15 seconds,
those of CIFAR-10 a minute. Where clients differ in more than their labels: `rules` and
`rules_skew`.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.studies import paper_small
from experiments.studies.methods import METHODS, choose
from experiments.studies.tasks import PARTITIONS
from experiments.studying.study import Study


def get_study() -> Study:
    """`flex` as it is, with affinity by updates, and with affinity beyond label shares."""
    alike = {**METHODS["flex"], "fitness.affinity": 1.0}
    return replace(
        paper_small.get_study(),
        name="affinity",
        methods={
            **choose("flex"),
            "flex_updates": alike,
            "flex_beyond_labels": {**alike, "fitness.profile": "beyond_labels"},
            **choose("fedavg"),
        },
        partitions={"k_class_4": PARTITIONS["k_class_4"]},
    )
