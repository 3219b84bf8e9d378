"""How much better 20 models predict together than each alone, where all clients have alike data.

    python -m experiments.sweep --study=experiments/studies/joint.py --data_dir=TFDS_DIR \
        --workdir=runs/joint

With four classes a client (`paper_small`), models that clients keep to themselves have the best
joint prediction (server accuracy) on CIFAR-10. There each also knows what others do not. Here the
partition is IID, so that only the number of different models counts. On one core a run takes one to
three minutes.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import choose
from experiments.studies.tasks import PARTITIONS, SMALL
from experiments.studying.study import Study


def get_study() -> Study:
    """The IID partition of `paper_small` on CIFAR-10, with shared and with private models."""
    return Study(
        name="joint",
        config=emnist_digits.get_config,
        methods=choose("flex", "fedavg", "pfedmoe", "local"),
        datasets={"cifar10": SMALL["cifar10"]},
        partitions={"iid": PARTITIONS["iid"]},
        seeds=(0, 1, 2),
    )
