"""Clients that join after training: how well experts serve them that they have never trained.

    python -m experiments.sweep --study=experiments/studies/newcomers.py --data_dir=FOLDER \
        --workdir=runs/newcomers

FOLDER holds a UTF-8 text file for each language (see `experiments/configs/languages.py`). On one
core a run takes four to eight minutes.
"""

from __future__ import annotations

from experiments.configs import languages
from experiments.studying.study import Study


def get_study() -> Study:
    """24 clients that train as in the study `domains`, and 8 that join at every evaluation.

    A newcomer downloads 4 of the 8 experts, twice its capacity: those to which the routers send
    most of its text.
    """
    coming = {"clients.count": 32, "clients.newcomers": 8, "clients.shortlist": 4}
    return Study(
        name="newcomers",
        config=languages.get_config,
        methods={"flex": {}},
        datasets={"languages": coming},
        partitions={"two_a_client": {}},
        seeds=(0, 1, 2),
    )
