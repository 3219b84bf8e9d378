"""Methods that studies compare: name to the config fields that make it."""

from __future__ import annotations

from experiments.studying.study import Axis

# Without our additions: fitness alone decides, gates are free, and their clients' own.
PLAIN = {
    "model.gate": "private",
    "assignment.load": "clients",
    "assignment.exploration": 0.0,
    "assignment.diversity": 0.0,
    "local.balance": 0.0,
}

PAPER = {**PLAIN, "assignment.policy": "flex", "fitness.score": "accuracy"}
# Holders that change, clients that use all they hold, and gates that travel with experts.
FLEX = {
    **PAPER,
    "model.gate": "shared",
    "assignment.load": "auto",
    "assignment.exploration": 1.0,
    "local.balance": 0.1,
}

# All parameters in one expert, which everybody holds: as wide as two of the default 128. It sees
# every example, so its steps are as long as those of the rest.
DENSE = {
    **PLAIN,
    "local.expert_rate": 1.0,
    "assignment.policy": "full",
    "model.experts": 1,
    "model.hidden": 256,
    "clients.capacity": 1,
}

METHODS: Axis = {
    # FLEX-MoE with our three additions: experts learn from many clients, and are used alike.
    "flex": FLEX,
    # The same with holders of unlike label mixes instead of holders that change.
    "flex_diverse": {**FLEX, "assignment.exploration": 0.0, "assignment.diversity": 3.0},
    # The same with the use foreseen weighed instead of holders counted.
    "flex_usage": {**FLEX, "assignment.load": "usage"},
    # The same with the loss score exp(-α l).
    "flex_loss": {**FLEX, "fitness.score": "loss"},
    # FLEX-MoE as the paper describes it, by either score: arXiv 2512.23070.
    "flex_paper": PAPER,
    "flex_paper_loss": {**PAPER, "fitness.score": "loss"},
    # Each client its fittest experts, no load bounds: the baseline of arXiv 2512.23070.
    "greedy": {**PLAIN, "assignment.policy": "greedy"},
    # Each client the experts that it used most so far: FedMoE, arXiv 2408.11304.
    "greedy_usage": {**PLAIN, "assignment.policy": "greedy_usage"},
    # Experts drawn anew every round: the usual null model.
    "random": {**PLAIN, "assignment.policy": "random"},
    # Experts dealt out in turn, the deal moved on every round: the balanced null model.
    "round_robin": {**PLAIN, "assignment.policy": "round_robin"},
    # Experts drawn once and kept for good: clustering by chance.
    "static": {**PLAIN, "assignment.policy": "static"},
    # Every client holds all experts: no capacity limit, the reference from above.
    "full": {**PLAIN, "assignment.policy": "full"},
    # Gates that stay with their clients, as the paper's do.
    "flex_private_gate": {**FLEX, "model.gate": "private"},
    # Server optimisers: FedAvgM (arXiv 1909.06335) and FedAdam (arXiv 2003.00295).
    "flex_fedavgm": {**FLEX, "server.momentum": 0.9, "server.learning_rate": 0.3},
    "flex_fedadam": {**FLEX, "server.optimizer": "adam", "server.learning_rate": 0.01},
    # One dense model of the size that a client with two experts holds: arXiv 1602.05629.
    "fedavg": DENSE,
    # As many such models as experts, of which a client trains the one of the least loss: IFCA,
    # arXiv 2006.04088. It downloads all of them to see which.
    "clustered": {
        **DENSE,
        "model.experts": 8,
        "model.whole_experts": True,
        "assignment.policy": "greedy",
        "fitness.score": "loss",
        "fitness.probe": "all",
    },
    # The dense model, held back near the server's: arXiv 1812.06127.
    "fedprox": {**DENSE, "local.proximal": 0.01},
    # The same without a federation: every client alone, for as many rounds.
    "local": {**DENSE, "model.private": "backbone,expert,head"},
    # The same with a head of each client's own (FedPer): arXiv 1912.00818.
    "fedper": {**DENSE, "model.private": "head"},
    # A shared extractor, one of the client's own, and its own gate and head: arXiv 2402.01350.
    "pfedmoe": {
        **DENSE,
        "model.hidden": 128,
        "model.local_backbone": True,
        "model.private": "backbone/local,backbone/mixture,head",
    },
}


def choose(*names: str) -> Axis:
    """Some of the methods, in the order given."""
    return {name: METHODS[name] for name in names}
