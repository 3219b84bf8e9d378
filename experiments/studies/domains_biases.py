"""The clients of `domains`, with balance biases in place of the in-client loss that evens out use.

    python -m experiments.sweep --study=experiments/studies/domains_biases.py --data_dir=FOLDER \
        --workdir=runs/domains_biases

The steps of the biases are those that `ablation` found best on pictures. On one core a run takes
five to eight minutes.
"""

from __future__ import annotations

from experiments.configs import languages
from experiments.studying.study import Study

# As the config was when this decided between the two.
BEFORE = {"fitness.affinity": 1.0}


def get_study() -> Study:
    """24 clients that hold 2 of 8 experts, with 15 KB of each of their two languages."""
    return Study(
        name="domains_biases",
        config=languages.get_config,
        methods={
            "flex": {**BEFORE, "local.balance": 0.02, "local.bias_rate": 0.0},
            "flex_biases": {**BEFORE, "local.balance": 0.0, "local.bias_rate": 0.1},
        },
        datasets={"languages": {}},
        partitions={"two_a_client": {"partition.domains_per_client": 2}},
        seeds=(0, 1, 2, 3, 4),
    )
