"""Joint prediction of clients' models that differ: after one more round for themselves alone.

    python -m experiments.sweep --study=experiments/studies/joint.py --data_dir=TFDS_DIR \
        --workdir=runs/joint

Under label skew the best joint predictions (server accuracy) are of methods whose clients keep
whole models to themselves. Here the clients of every method have such models once they have
fine-tuned. On one core a run takes about 20 seconds on EMNIST digits, and two minutes on CIFAR-10.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import choose
from experiments.studies.tasks import PARTITIONS, SMALL
from experiments.studying.study import Study

TUNED = {"eval.fine_tune": True}


def get_study() -> Study:
    """The 4-class partition of `paper_small`, with fine-tuned figures of five methods."""
    return Study(
        name="joint",
        config=emnist_digits.get_config,
        methods=choose("flex", "random", "fedavg", "pfedmoe", "local"),
        datasets={name: {**changes, **TUNED} for name, changes in SMALL.items()},
        partitions={"k_class_4": PARTITIONS["k_class_4"]},
        seeds=(0, 1, 2),
    )
