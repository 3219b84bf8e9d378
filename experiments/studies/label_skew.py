"""Label skew alone, with the prior: all methods, and three of them with adjusted losses.

    python -m experiments.sweep --study=experiments/studies/label_skew.py \
        --data_dir=TFDS_DIR --workdir=runs/label_skew

TFDS_DIR holds `emnist/digits` as TFDS prepares it (array_record). 81 runs of 13 to 16 seconds on
one core.
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
    """Returns the study of the 4-class partition of `paper_small`, on EMNIST digits."""
    return Study(
        name="label_skew",
        config=emnist_digits.get_config,
        methods={**METHODS, **ADJUSTED},
        datasets={"emnist_digits": SMALL["emnist_digits"]},
        partitions={"k_class_4": PARTITIONS["k_class_4"]},
        seeds=(0, 1, 2),
    )
