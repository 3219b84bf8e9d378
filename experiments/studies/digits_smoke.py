"""A study of three minutes without download that checks whether the whole chain works here.

    python -m experiments.sweep --study=experiments/studies/digits_smoke.py --workdir=runs/smoke

Sixteen runs on the embedded digits.
"""

from __future__ import annotations

from experiments.configs import digits
from experiments.studies.methods import choose
from experiments.studies.tasks import DATASETS, PARTITIONS
from experiments.studying.study import Study


def get_study() -> Study:
    """A few rounds of a small network."""
    quick = {"rounds": 6, "model.backbone": "mlp", "clients.capacity": 2}
    return Study(
        name="digits_smoke",
        config=digits.get_config,
        methods=choose("flex", "greedy", "random", "full"),
        datasets={"digits": {**DATASETS["digits"], **quick}},
        partitions={name: PARTITIONS[name] for name in ("iid", "k_class_4")},
        seeds=(0, 1),
    )
