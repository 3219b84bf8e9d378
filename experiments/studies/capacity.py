"""How many experts must a client hold? Accuracy against capacity, on EMNIST digits.

    python -m experiments.sweep --study=experiments/studies/capacity.py \
        --data_dir=TFDS_DIR --workdir=runs/capacity

TFDS_DIR holds `emnist/digits` as TFDS prepares it (array_record). 45 runs of ten
seconds each on one core.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import choose
from experiments.studies.tasks import PARTITIONS, SMALL
from experiments.studying.study import Axis, Study

# "1-4" gives capacities 1 to 4 to equal numbers of clients.
CAPACITIES: Axis = {
    "1": {"clients.capacity": 1},
    "2": {"clients.capacity": 2},
    "4": {"clients.capacity": 4},
    "8": {"clients.capacity": 8},
    "1-4": {"clients.capacity": "1-4"},
}


def get_study() -> Study:
    """The 4-class partition, 8 experts."""
    return Study(
        name="capacity",
        config=emnist_digits.get_config,
        methods=choose("flex", "greedy", "random"),
        datasets={"emnist_digits": SMALL["emnist_digits"]},
        partitions={"k_class_4": PARTITIONS["k_class_4"]},
        seeds=(0, 1, 2),
        variants={"capacity": CAPACITIES},
    )
