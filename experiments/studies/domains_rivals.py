"""Alternatives to `flex` that a user might choose if clients differ in their languages.

    python -m experiments.sweep --study=experiments/studies/domains_rivals.py --data_dir=FOLDER \
        --workdir=runs/domains_rivals

FOLDER and clients are those of `domains`. On one core a run takes three to seven minutes.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.studies import domains
from experiments.studies.methods import METHODS
from experiments.studying.study import Axis, Study

PARTS = ("embedding", "blocks_0", "blocks_1", "norm", "head")

RIVALS: Axis = {
    "flex": {},
    # As large as all experts together, which no client could hold.
    "fedavg_all": {**METHODS["fedavg"], **domains.DENSE, "model.hidden": 8 * 128},
    # Every client alone, for the same number of rounds.
    "local": {**METHODS["fedavg"], **domains.DENSE, "model.private": ",".join(PARTS)},
    # Whole models as experts, one for each client, chosen by loss: IFCA.
    "clustered": {**METHODS["clustered"], **domains.DENSE},
}


def get_study() -> Study:
    """As `domains`, with other methods."""
    return replace(domains.get_study(), name="domains_rivals", methods=RIVALS, seeds=(0, 1, 2))
