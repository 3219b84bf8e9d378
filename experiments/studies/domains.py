"""Where clients differ in what is true of the same input: two of eight languages a client.

    python -m experiments.sweep --study=experiments/studies/domains.py --data_dir=FOLDER \
        --workdir=runs/domains

FOLDER holds a UTF-8 text file for each language (see `experiments/configs/languages.py`). On one
core a run takes five minutes.
"""

from __future__ import annotations

from experiments.configs import languages
from experiments.studies.methods import METHODS
from experiments.studying.study import Axis, Study

# All but the assignment is the same for whoever deals experts out.
RIVALS: Axis = {
    "flex": {},
    "random": {"assignment.policy": "random"},
    "fedavg": METHODS["fedavg"],
}


def get_study() -> Study:
    """24 clients that hold 2 of 8 experts, with 15 KB of each of their two languages."""
    return Study(
        name="domains",
        config=languages.get_config,
        methods=RIVALS,
        datasets={"languages": {}},
        partitions={"two_a_client": {"partition.domains_per_client": 2}},
        seeds=(0, 1, 2),
    )
