"""The paper's comparison at a size for two CPU cores: a small network, few rounds.

    python -m experiments.sweep --study=experiments/studies/paper_small.py \
        --data_dir=TFDS_DIR --workdir=runs/paper_small

TFDS_DIR holds `emnist/digits` and `cifar10` as TFDS prepares them (array_record). All methods, and
three of them with other losses, on two data sets, three partitions and three seeds, 486 runs. On
one core a digits run takes 8 seconds and a CIFAR-10 run 60 to 90.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import METHODS
from experiments.studies.tasks import PARTITIONS, SMALL
from experiments.studying.study import Axis, Study

# Further methods: clients train on logits + τ log π, where π are their label shares: logit
# adjustment (arXiv 2007.07314).
ADJUSTED: Axis = {
    f"{name}_tau_{tau:g}": {**METHODS[name], "local.prior": tau}
    for name in ("flex", "random", "fedavg")
    for tau in (0.5, 1.0)
}


def get_study() -> Study:
    """20 clients that hold 2 of 8 experts; 16 local steps a round, on 16 examples each."""
    return Study(
        name="paper_small",
        config=emnist_digits.get_config,
        methods={**METHODS, **ADJUSTED},
        datasets=SMALL,
        partitions=PARTITIONS,
        seeds=(0, 1, 2),
    )
