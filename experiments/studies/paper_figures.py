"""Does `flex` reach the paper's accuracies with capacities below E, and what does a dense model do?

    python -m experiments.sweep --study=experiments/studies/paper_figures.py \
        --data_dir=TFDS_DIR --workdir=runs/paper_figures

TFDS_DIR holds `emnist/digits` and `cifar10` as TFDS prepares them (array_record). A small CNN, 1 to
4 of 8 experts a client, learning rates that fall to 0. On one core a digits run takes three minutes
and a CIFAR-10 run a quarter of an hour. arXiv 2512.23070 reports 98.3 % under IID, 86.9 % under
Dirichlet(0.8) and 82.6 % with 4 classes on EMNIST digits; 83 %, 68.8 % and 65.5 % on CIFAR-10.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import METHODS, choose
from experiments.studies.tasks import PARTITIONS, SMALL
from experiments.studying.study import Study


def get_study() -> Study:
    """All three partitions, three seeds."""
    longer = {
        "model.backbone": "cnn",
        "clients.capacity": "1-4",
        "eval.every": 10,
        "local.decay": "cosine",
    }
    digits = {**SMALL["emnist_digits"], **longer, "rounds": 100}
    # Twice as wide, trained seven times as long, with half of the images mirrored.
    cifar10 = {
        **SMALL["cifar10"],
        **longer,
        "rounds": 320,
        "model.widths": (32, 64, 128),
        "local.augment": "flip",
    }
    return Study(
        name="paper_figures",
        config=emnist_digits.get_config,
        # As wide as 2.5 experts, the mean number that a client holds.
        methods={**choose("flex"), "fedavg": {**METHODS["fedavg"], "model.hidden": 320}},
        datasets={"emnist_digits": digits, "cifar10": cifar10},
        partitions=PARTITIONS,
        seeds=(0, 1, 2),
    )
