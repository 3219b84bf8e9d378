"""The languages of `domains` in other amounts: one language a client, and four times the text.

With one language, a client needs one of its two experts more than the other.

    python -m experiments.sweep --study=experiments/studies/domains_settings.py --data_dir=FOLDER \
        --workdir=runs/domains_settings

FOLDER and methods are those of `domains`.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.studies import domains
from experiments.studying.study import Axis, Study

ONE_LANGUAGE = {"partition.domains_per_client": 1, "partition.bytes_per_client": 15_000}
SETTINGS: Axis = {
    "one_a_client": ONE_LANGUAGE,
    "two_of_60_kb": {"partition.domains_per_client": 2, "partition.bytes_per_client": 120_000},
}


def get_study() -> Study:
    """As `domains`, with other partitions."""
    return replace(
        domains.get_study(), name="domains_settings", partitions=SETTINGS, seeds=(0, 1, 2)
    )
