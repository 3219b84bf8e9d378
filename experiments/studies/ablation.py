"""What each part of `flex` is worth: one change at a time, on EMNIST digits.

    python -m experiments.sweep --study=experiments/studies/ablation.py \
        --data_dir=TFDS_DIR --workdir=runs/ablation

TFDS_DIR holds `emnist/digits` as TFDS prepares it (array_record). The differences from `flex` in
the table are the effects. 87 runs of eight seconds each on one core.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import FLEX, METHODS, PAPER
from experiments.studies.tasks import PARTITIONS, SMALL
from experiments.studying.study import Axis, Study

CHANGES: Axis = {
    # Without one of our three additions, with only one, or with none, as in the paper.
    "no_exploration": {"assignment.exploration": 0.0},
    "no_local_balance": {"local.balance": 0.0},
    "private_gate": {"model.gate": "private"},
    "only_exploration": {**PAPER, "assignment.exploration": 1.0},
    "only_local_balance": {**PAPER, "local.balance": FLEX["local.balance"]},
    "only_shared_gate": {**PAPER, "model.gate": "shared"},
    "paper": PAPER,
    # Less or more exploration; diversity of holders instead of it, in addition to it, or alone.
    "exploration_0.3": {"assignment.exploration": 0.3},
    "exploration_3": {"assignment.exploration": 3.0},
    "diverse": {"assignment.exploration": 0.0, "assignment.diversity": 3.0},
    "and_diverse": {"assignment.diversity": 3.0},
    "only_diverse": {**PAPER, "assignment.diversity": 3.0},
    # The null model, without and with the two additions that do not concern the assignment.
    "random": METHODS["random"],
    "random_balance_shared_gate": {
        **METHODS["random"],
        "local.balance": FLEX["local.balance"],
        "model.gate": "shared",
    },
    # Fitness: score, weight β of the newest score, start value.
    "score_loss": {"fitness.score": "loss"},
    "beta_0.1": {"fitness.beta": 0.1},
    "initial_0": {"fitness.initial": 0.0},
    # In-client balance loss; load: what it counts, and how far it may deviate from the even share.
    "local_balance_0.05": {"local.balance": 0.05},
    "local_balance_1": {"local.balance": 1.0},
    "load_samples": {"assignment.load": "samples"},
    "load_usage": {"assignment.load": "usage"},
    "slack_0.3": {"assignment.slack": 0.3},
    "slack_1": {"assignment.slack": 1.0},
    # With load `usage`: no memory of the deficit, or the other rounding.
    "usage_no_deficit": {"assignment.load": "usage", "assignment.deficit_decay": 0.0},
    "usage_shmoys_tardos": {"assignment.load": "usage", "assignment.rounding": "shmoys_tardos"},
}


def get_study() -> Study:
    """The 4-class partition."""
    flex = METHODS["flex"]
    return Study(
        name="ablation",
        config=emnist_digits.get_config,
        methods={"flex": flex, **{name: {**flex, **change} for name, change in CHANGES.items()}},
        datasets={"emnist_digits": {**SMALL["emnist_digits"], "rounds": 30, "eval.every": 10}},
        partitions={"k_class_4": PARTITIONS["k_class_4"]},
        seeds=(0, 1, 2),
    )
