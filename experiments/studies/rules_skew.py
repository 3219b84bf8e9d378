"""Rotated digits as in `rules`, with label skew on top: four classes a client.

    python -m experiments.sweep --study=experiments/studies/rules_skew.py --data_dir=TFDS_DIR \
        --workdir=runs/rules_skew

TFDS_DIR, methods and cost are those of `rules`.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.studies import rules
from experiments.studying.study import Axis, Study

FOUR_CLASSES = {"partition.name": "k_class", "partition.classes_per_client": 4, **rules.TWO_TURNS}
PARTITIONS: Axis = {
    "turned_4_class": FOUR_CLASSES,
    # Losses are adjusted by label shares, so updates differ less by classes.
    "turned_4_class_adjusted": {**FOUR_CLASSES, "local.prior": 0.5},
}


def get_study() -> Study:
    """As `rules`, with other partitions."""
    return replace(rules.get_study(), name="rules_skew", partitions=PARTITIONS, seeds=range(5))
