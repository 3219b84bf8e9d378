"""Where clients differ in what is true of the same input: texts in some of eight languages each.

    python -m experiments.sweep --study=experiments/studies/domains.py --data_dir=FOLDER \
        --workdir=runs/domains

FOLDER holds a UTF-8 text file for each language (see `experiments/configs/languages.py`). On one
core a run takes six to eight minutes.
"""

from __future__ import annotations

from experiments.configs import languages
from experiments.studies.methods import METHODS
from experiments.studying.study import Axis, Study

SCORES_ALONE = {"fitness.affinity": 0.0}
# One expert a client needs no router to choose it.
DENSE = {**SCORES_ALONE, "model.router": False}

# All but the assignment is the same for whoever deals experts out.
METHODS_OF_DOMAINS: Axis = {
    "flex": {},
    # Experts go by clients' languages, which no server knows: the reference from above.
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
