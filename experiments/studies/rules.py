"""Where clients differ in what a picture is called: relabelled digits.

    python -m experiments.sweep --study=experiments/studies/rules.py --data_dir=TFDS_DIR \
        --workdir=runs/rules

TFDS_DIR holds `emnist/digits` as TFDS prepares it (array_record). On one core a run takes half a
minute to a minute and a half.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import METHODS, choose
from experiments.studies.tasks import SMALL
from experiments.studying.study import Axis, Study

# Holders go by what their clients' updates tell, and stay.
FLEX = {
    **METHODS["flex"],
    "assignment.exploration": 0.0,
    "fitness.affinity": 1.0,
}

METHODS_OF_RULES: Axis = {
    "flex": FLEX,
    # Experts go by clients' rules, which no server knows: the reference from above.
    "oracle": {**FLEX, "fitness.profile": "given"},
    **choose("random", "greedy", "fedavg"),
}


def get_study() -> Study:
    """20 clients that hold 2 of 8 experts; 16 local steps a round, on 16 examples each."""
    return Study(
        name="rules",
        config=emnist_digits.get_config,
        methods=METHODS_OF_RULES,
        datasets={"emnist_digits": SMALL["emnist_digits"]},
        partitions={"relabelled": {"partition.name": "iid", "partition.rule": "relabelled"}},
        seeds=(0, 1, 2),
    )
