"""The paper's comparison at a size for two CPU cores: a small network, few rounds.

    python -m experiments.sweep --study=experiments/studies/paper_small.py \
        --data_dir=TFDS_DIR --workdir=runs/paper_small

TFDS_DIR holds `emnist/digits` and `cifar10` as TFDS prepares them (array_record). All methods on
two data sets, three partitions and three seeds, 378 runs. On one core a digits run takes 13 to 16
seconds and a CIFAR-10 run 60 to 90.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import METHODS
from experiments.studies.tasks import PARTITIONS, SMALL
from experiments.studying.study import Study


def get_study() -> Study:
    """20 clients that hold 2 of 8 experts; 16 local steps a round, on 16 examples each."""
    return Study(
        name="paper_small",
        config=emnist_digits.get_config,
        methods=METHODS,
        datasets=SMALL,
        partitions=PARTITIONS,
        seeds=(0, 1, 2),
    )
