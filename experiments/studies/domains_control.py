"""The control of `domains`: one language for all clients, split by position in the text.

    python -m experiments.sweep --study=experiments/studies/domains_control.py \
        --data_dir=FOLDER_OF_ONE_TEXT --workdir=runs/domains_control

All clients learn the same thing, so no method should win much. On one core a run takes three to
four minutes.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.studies import domains
from experiments.studying.study import Study


def get_study() -> Study:
    """As `domains`, without the oracle: all clients have the same language."""
    return replace(
        domains.get_study(),
        name="domains_control",
        methods={name: domains.METHODS_OF_DOMAINS[name] for name in ("flex", "random", "fedavg")},
        datasets={"one_language": {}},
        partitions={
            "by_place": {"partition.domains_per_client": 1, "partition.bytes_per_client": 15_000}
        },
        seeds=(0, 1, 2),
    )
