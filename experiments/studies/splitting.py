"""What it costs under label skew to split a dense model's data over experts.

    python -m experiments.sweep --study=experiments/studies/splitting.py --data_dir=TFDS_DIR \
        --workdir=runs/splitting

All clients have room for two experts, and their models are as large as the dense one. With two
experts in all there is nothing to assign; the more there are, the fewer clients train each. On one
core a run takes 15 to 30 seconds on EMNIST digits, and one to two minutes on CIFAR-10.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import METHODS
from experiments.studies.tasks import PARTITIONS, SMALL
from experiments.studying.study import Axis, Study

EXPERTS = (2, 4, 8, 16)
SPLIT: Axis = {
    "fedavg": METHODS["fedavg"],
    **{f"flex_{n}": {**METHODS["flex"], "model.experts": n} for n in EXPERTS},
}


def get_study() -> Study:
    """The 4-class partition of `paper_small`: FedAvg against `flex` with 2 to 16 experts."""
    return Study(
        name="splitting",
        config=emnist_digits.get_config,
        methods=SPLIT,
        datasets=SMALL,
        partitions={"k_class_4": PARTITIONS["k_class_4"]},
        seeds=(0, 1, 2),
        reference="fedavg",
    )
