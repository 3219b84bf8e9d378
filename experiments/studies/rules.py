"""Clients for which the same picture has different labels: relabelled and rotated digits.

    python -m experiments.sweep --study=experiments/studies/rules.py --data_dir=TFDS_DIR \
        --workdir=runs/rules

TFDS_DIR holds `emnist/digits` as TFDS prepares it (array_record). On one core a run takes 20 to 40
seconds, with the largest model a minute.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import METHODS, choose
from experiments.studies.tasks import SMALL
from experiments.studying.study import Axis, Study

# Every picture passes through both experts of its client, as it does through the whole of a dense
# model of that size.
BOTH = {"model.top_k": 2}
FLEX = {**METHODS["flex"], **BOTH}

METHODS_OF_RULES: Axis = {
    "flex": FLEX,
    # The same without exploration: affinity counts from the start, without evidence of kinds.
    "flex_at_once": {**FLEX, "fitness.evidence": 0.0, "assignment.exploration": 0.0},
    # By scores alone: holders change throughout.
    "flex_scores": {**FLEX, "fitness.affinity": 0.0},
    # Experts are assigned by the clients' rules, which no server knows: an upper reference.
    "oracle": {**FLEX, "fitness.profile": "given"},
    "random": {**METHODS["random"], **BOTH},
    "greedy": {**METHODS["greedy"], **BOTH},
    **choose("fedavg"),
    # As large as all experts together, which no client could hold.
    "fedavg_all": {**METHODS["fedavg"], "model.hidden": 8 * 128},
    **choose("local", "clustered"),
}

TWO_TURNS = {"partition.rule": "turned", "partition.rules_per_client": 2}
# Evaluation includes clients after one more round of training, each for itself.
DIGITS = {**SMALL["emnist_digits"], "eval.fine_tune": True}


def get_study() -> Study:
    """20 clients that hold 2 of 8 experts; 16 local steps a round, on 16 examples each."""
    return Study(
        name="rules",
        config=emnist_digits.get_config,
        methods=METHODS_OF_RULES,
        datasets={"emnist_digits": DIGITS},
        partitions={
            # Each client has one of four permutations of the labels: no model is right for all.
            "relabelled": {"partition.name": "iid", "partition.rule": "relabelled"},
            # Its pictures are turned in two of four ways.
            "turned": {"partition.name": "iid", **TWO_TURNS},
        },
        seeds=range(10),
    )
