"""Where clients differ in what is true of the same input: texts in some of eight languages each.

    python -m experiments.sweep --study=experiments/studies/domains.py --data_dir=FOLDER \
        --workdir=runs/domains

FOLDER holds a UTF-8 text file for each language (see `experiments/configs/languages.py`). On one
core a run takes three to five minutes, `fedavg_all` ten.
"""

from __future__ import annotations

from experiments.configs import languages
from experiments.studies.methods import METHODS
from experiments.studying.study import Axis, Study

SCORES_ALONE = {"fitness.affinity": 0.0}
DENSE = {**METHODS["fedavg"], **SCORES_ALONE, "model.router": False}

METHODS_OF_DOMAINS: Axis = {
    "flex": {},
    # Experts go by clients' languages, which no server knows: the reference from above.
    "oracle": {"fitness.profile": "given"},
    # Scores alone, and noise on them that falls to 0 by half-time.
    "flex_scores": {
        **SCORES_ALONE,
        "assignment.exploration": 0.1,
        "assignment.exploration_rounds": 40,
    },
    "random": {**SCORES_ALONE, "assignment.policy": "random"},
    "greedy": {**SCORES_ALONE, "assignment.policy": "greedy"},
    "fedavg": DENSE,
    "local": {**METHODS["local"], **SCORES_ALONE, "model.router": False},
    # As large as all experts together, which nobody could hold.
    "fedavg_all": {**DENSE, "model.hidden": 1024},
}


def get_study() -> Study:
    """24 clients that hold 2 of 8 experts, with 30 KB of text each."""
    return Study(
        name="domains",
        config=languages.get_config,
        methods=METHODS_OF_DOMAINS,
        datasets={"languages": {}},
        partitions={
            "two_a_client": {"partition.domains_per_client": 2},
            "one_a_client": {"partition.domains_per_client": 1},
            # No differences between clients, and so nothing for an assignment to find.
            "all_a_client": {"partition.domains_per_client": 8},
        },
        seeds=(0, 1, 2, 3, 4),
    )
