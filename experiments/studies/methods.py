"""Methods that studies compare: name to the config fields that define the method."""

from __future__ import annotations

from experiments.studying.study import Axis

# Without our additions: fitness alone decides, gates have no balance loss and stay with clients.
PLAIN = {
    "fitness.affinity": 0.0,
    "model.gate": "private",
    "assignment.load": "clients",
    "assignment.exploration": 0.0,
    "assignment.diversity": 0.0,
    "local.balance": 0.0,
}

PAPER = {**PLAIN, "assignment.policy": "flex", "fitness.score": "accuracy"}
# Our additions: holders change, until updates tell which clients are alike; clients use all experts
# that they hold; gates are shared.
FLEX = {
    **PAPER,
    "fitness.affinity": 1.0,
    "model.gate": "shared",
    "assignment.load": "auto",
    "assignment.exploration": 1.0,
    "local.balance": 0.1,
}

# One expert, which all clients hold: as wide as two of the default width 128. It sees every
# example, so its learning rate is that of the other parameters.
DENSE = {
    **PLAIN,
    "local.expert_rate": 1.0,
    "assignment.policy": "full",
    "model.experts": 1,
    "model.hidden": 256,
    "clients.capacity": 1,
}

METHODS: Axis = {
    # FLEX-MoE with our additions: experts learn from many clients, and are used evenly.
    "flex": FLEX,
    # The same, but an expert's holders have different label mixes, instead of changing.
    "flex_diverse": {**FLEX, "assignment.exploration": 0.0, "assignment.diversity": 3.0},
    # The same, but load is the expected usage, not the number of holders.
    "flex_usage": {**FLEX, "assignment.load": "usage"},
    # The same with the loss score exp(-α l).
    "flex_loss": {**FLEX, "fitness.score": "loss"},
    # FLEX-MoE as the paper describes it, with either score: arXiv 2512.23070.
    "flex_paper": PAPER,
    "flex_paper_loss": {**PAPER, "fitness.score": "loss"},
    # Each client gets its fittest experts, no load bounds: the baseline of arXiv 2512.23070.
    "greedy": {**PLAIN, "assignment.policy": "greedy"},
    # Each client gets the experts that it has used most so far: FedMoE, arXiv 2408.11304.
    "greedy_usage": {**PLAIN, "assignment.policy": "greedy_usage"},
    # Experts drawn at random every round: the usual null model.
    "random": {**PLAIN, "assignment.policy": "random"},
    # Experts assigned in turn, shifted every round: the balanced null model.
    "round_robin": {**PLAIN, "assignment.policy": "round_robin"},
    # Experts drawn once and kept: random clusters.
    "static": {**PLAIN, "assignment.policy": "static"},
    # Every client holds all experts: no capacity limit, the upper reference.
    "full": {**PLAIN, "assignment.policy": "full"},
    # Gates stay with their clients, as in the paper.
    "flex_private_gate": {**FLEX, "model.gate": "private"},
    # Server optimisers: FedAvgM (arXiv 1909.06335) and FedAdam (arXiv 2003.00295).
    "flex_fedavgm": {**FLEX, "server.momentum": 0.9, "server.learning_rate": 0.3},
    "flex_fedadam": {**FLEX, "server.optimizer": "adam", "server.learning_rate": 0.01},
    # One dense model, as large as that of a client with two experts: FedAvg, arXiv 1602.05629.
    "fedavg": DENSE,
    # One such model for each expert; a client downloads all of them, and trains the one with the
    # lowest loss: IFCA, arXiv 2006.04088.
    "clustered": {
        **DENSE,
        "model.experts": 8,
        "model.whole_experts": True,
        "assignment.policy": "greedy",
        "fitness.score": "loss",
        "fitness.probe": "all",
    },
    # The dense model with a penalty on the distance to the server's: FedProx, arXiv 1812.06127.
    "fedprox": {**DENSE, "local.proximal": 0.01},
    # The dense model without a federation: every client alone, for the same number of rounds.
    "local": {**DENSE, "model.private": "backbone,expert,head"},
    # The dense model with a private head for each client: FedPer, arXiv 1912.00818.
    "fedper": {**DENSE, "model.private": "head"},
    # A shared and a private extractor for each client, a private gate and head: arXiv 2402.01350.
    "pfedmoe": {
        **DENSE,
        "model.hidden": 128,
        "model.local_backbone": True,
        "model.private": "backbone/local,backbone/mixture,head",
    },
}


# The study's config as it stands. It is a method of your own studies, and none of those above.
AS_IT_STANDS: Axis = {"config": {}}


def choose(*names: str) -> Axis:
    """Selects methods by name, in the order given.

    A method sets its fields whatever the study's config says, so that a name means the same in
    every study; `config` sets none.
    """
    known = {**METHODS, **AS_IT_STANDS}
    return {name: known[name] for name in names}
