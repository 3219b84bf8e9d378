"""Which defence helps against which attack? Faulty clients among those of the embedded digits.

    python -m experiments.sweep --study=experiments/studies/defences.py --workdir=runs/defences

Every combination of what 10, 20 or 40 % of the clients do to their updates (no numbers, turned
around, 1000 times too long, drowned in noise 10 times as long) with how the server makes one update
of many, with quarantine, which is on by default, and with none. 273 runs of five seconds each.
"""

from __future__ import annotations

from experiments.configs import digits
from experiments.studies.tasks import DATASETS
from experiments.studying.study import Axis, Study
from flexmoe_jax.federated import FAULTS

SHARES = (0.1, 0.2, 0.4)
ATTACKS: Axis = {
    "none": {"faults.share": 0.0},
    **{
        f"{kind}_{share:.0%}".rstrip("%"): {"faults.kind": kind, "faults.share": share}
        for kind in FAULTS
        for share in SHARES
    },
}

ROBUST = ("trimmed_mean", "median", "geometric_median")
DEFENCES: Axis = {
    # The default: the mean of what quarantine lets in.
    "mean": {"server.aggregator": "mean"},
    **{name: {"server.aggregator": name} for name in ROBUST},
    # The same without quarantine; a mean without it does not outlive the first NaN.
    **{f"{name}_alone": {"server.aggregator": name, "server.quarantine": False} for name in ROBUST},
}


def get_study() -> Study:
    """Few rounds of a small network."""
    quick = {"rounds": 20, "model.backbone": "mlp", "eval.every": 5}
    return Study(
        name="defences",
        config=digits.get_config,
        methods=DEFENCES,
        datasets={"digits": {**DATASETS["digits"], **quick}},
        partitions={"dirichlet_0.3": {"partition.name": "dirichlet", "partition.alpha": 0.3}},
        seeds=(0, 1, 2),
        variants={"faults": ATTACKS},
        reference="mean",
    )
