"""What each part of FLEX-MoE is worth: one field changed at a time, on EMNIST digits.

    python -m experiments.sweep --study=experiments/studies/ablation.py \
        --data_dir=TFDS_DIR --workdir=runs/ablation

TFDS_DIR holds `emnist/digits` as TFDS prepares it (array_record). `flex` has every field at its
default, so the differences from it in the table are the effects. 84 runs of about a minute each on
two cores.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import METHODS
from experiments.studies.tasks import DATASETS, PARTITIONS
from experiments.studying.study import Axis, Study

CHANGES: Axis = {
    # Fitness: score, weight β of the newest score, start value.
    "score_loss": {"fitness.score": "loss"},
    "beta_0.1": {"fitness.beta": 0.1},
    "beta_1": {"fitness.beta": 1.0},
    "initial_0": {"fitness.initial": 0.0},
    # Load bounds: slack δ, what counts as load, memory of the deficit.
    "slack_0": {"assignment.slack": 0.0},
    "slack_0.3": {"assignment.slack": 0.3},
    "slack_1": {"assignment.slack": 1.0},
    "load_samples": {"assignment.load": "samples"},
    "load_usage": {"assignment.load": "usage"},
    "no_deficit": {"assignment.deficit_decay": 0.0},
    # Rounding, where weighted loads make it work to be done.
    "usage_shmoys_tardos": {"assignment.load": "usage", "assignment.rounding": "shmoys_tardos"},
    # Without one of our additions, or both, which is the paper's form.
    "no_diversity": {"assignment.diversity": 0.0},
    "no_local_balance": {"local.balance": 0.0},
    "paper": {"assignment.diversity": 0.0, "local.balance": 0.0},
}


def get_study() -> Study:
    """The 4-class and the Dirichlet partition."""
    reduced = {"local.max_steps": 8, "eval.every": 2, "data.test_limit": 2000}
    flex = METHODS["flex"]
    return Study(
        name="ablation",
        config=emnist_digits.get_config,
        methods={"flex": flex, **{name: {**flex, **change} for name, change in CHANGES.items()}},
        datasets={"emnist_digits": {**DATASETS["emnist_digits"], **reduced}},
        partitions={name: PARTITIONS[name] for name in ("k_class_4", "dirichlet_0.8")},
        seeds=(0, 1, 2),
    )
