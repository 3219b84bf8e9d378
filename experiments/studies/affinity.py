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
    """`flex`, by scores alone, and with affinity that counts from the start, in two ways."""
    alike = {**METHODS["flex"], "fitness.evidence": 0.0}
    return replace(
        paper_small.get_study(),
        name="affinity",
        methods={
            **choose("flex"),
            "flex_scores": {**METHODS["flex"], "fitness.affinity": 0.0},
            "flex_updates": {**alike, "fitness.profile": "updates"},
            "flex_beyond_labels": alike,
            **choose("fedavg"),
        },
        partitions={"k_class_4": PARTITIONS["k_class_4"]},
    )
