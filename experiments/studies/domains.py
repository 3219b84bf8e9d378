"""Clients for which the same input has different outputs: texts in two of eight languages each.

    python -m experiments.sweep --study=experiments/studies/domains.py --data_dir=FOLDER \
        --workdir=runs/domains

FOLDER holds a UTF-8 text file for each language (see `experiments/configs/languages.py`). On one
core a run takes four to eight minutes.
"""

from __future__ import annotations

from experiments.configs import languages
from experiments.studies.methods import METHODS
from experiments.studying.study import Axis, Study

SCORES_ALONE = {"fitness.affinity": 0.0}
# With one expert for each client there is nothing for a router to choose.
DENSE = {**SCORES_ALONE, "model.router": False}

# `flex`, `oracle` and `random` differ in the assignment alone.
METHODS_OF_DOMAINS: Axis = {
    "flex": {},
    # Experts are assigned by the clients' languages, which no server knows: an upper reference.
    "oracle": {"fitness.profile": "given"},
    "random": {**SCORES_ALONE, "assignment.policy": "random"},
    "fedavg": {**METHODS["fedavg"], **DENSE},
}


def get_study() -> Study:
    """24 clients that hold 2 of 8 experts, with 15 KB of each of their two languages."""
    return Study(
        name="domains",
        config=languages.get_config,
        methods=METHODS_OF_DOMAINS,
        datasets={"languages": {}},
        partitions={"two_a_client": {"partition.domains_per_client": 2}},
        seeds=(0, 1, 2, 3, 4),
    )
