"""Which defence helps against which attack? The embedded digits, with a share of faulty clients.

    python -m experiments.sweep --study=experiments/studies/defences.py --workdir=runs/defences

Every combination of a fault in the updates of 10, 20 or 40 % of the clients (NaN, sign reversed,
1000 times too long, noise added that is 10 times as long) with an aggregator of the server, with
quarantine, which is on by default, and without it. 273 runs of five to
eleven seconds each.
"""

from __future__ import annotations

from experiments.configs import digits
from experiments.studies.tasks import DATASETS
from experiments.studying.study import Axis, Study
from flexmoe_jax.simulation import FAULTS

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
    # The default: the mean of the updates that quarantine accepts.
    "mean": {"server.aggregator": "mean"},
    **{name: {"server.aggregator": name} for name in ROBUST},
    # The same without quarantine. A mean without it is left out: the first NaN destroys it.
    **{f"{name}_alone": {"server.aggregator": name, "server.quarantine": False} for name in ROBUST},
}


def get_study() -> Study:
    """A few rounds of a small network."""
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
