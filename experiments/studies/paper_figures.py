"""Does `flex` reach the paper's accuracies on EMNIST digits with capacities below E?

    python -m experiments.sweep --study=experiments/studies/paper_figures.py \
        --data_dir=TFDS_DIR --workdir=runs/paper_figures

TFDS_DIR holds `emnist/digits` as TFDS prepares it (array_record). A small CNN, 1 to 4 of 8 experts
a client, learning rates that fall to 0 over 100 rounds. 9 runs of about three minutes on one core.
arXiv 2512.23070 reports 98.3 % under IID, 86.9 % under Dirichlet(0.8) and 82.6 % with 4 classes.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import choose
from experiments.studies.tasks import PARTITIONS, SMALL
from experiments.studying.study import Study


def get_study() -> Study:
    """All three partitions, three seeds."""
    longer = {
        "model.backbone": "cnn",
        "clients.capacity": "1-4",
        "rounds": 100,
        "eval.every": 10,
        "local.decay": "cosine",
    }
    return Study(
        name="paper_figures",
        config=emnist_digits.get_config,
        methods=choose("flex"),
        datasets={"emnist_digits": {**SMALL["emnist_digits"], **longer}},
        partitions=PARTITIONS,
        seeds=(0, 1, 2),
    )
