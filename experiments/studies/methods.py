"""Methods that studies compare: name to the config fields that make it."""

from __future__ import annotations

from experiments.studying.study import Axis

METHODS: Axis = {
    # FLEX-MoE, accuracy score: arXiv 2512.23070.
    "flex": {"assignment.policy": "flex", "fitness.score": "accuracy"},
    # FLEX-MoE, loss score exp(-α l): arXiv 2512.23070.
    "flex_loss": {"assignment.policy": "flex", "fitness.score": "loss"},
    # Each client its fittest experts, no load bounds: the baseline of arXiv 2512.23070.
    "greedy": {"assignment.policy": "greedy"},
    # Each client the experts that it used most so far: FedMoE, arXiv 2408.11304.
    "greedy_usage": {"assignment.policy": "greedy_usage"},
    # Experts drawn anew every round: the usual null model.
    "random": {"assignment.policy": "random"},
    # Experts dealt out in turn, the deal moved on every round: the balanced null model.
    "round_robin": {"assignment.policy": "round_robin"},
    # Experts drawn once and kept for good: clustering by chance.
    "static": {"assignment.policy": "static"},
    # Every client holds all experts: no capacity limit, the reference from above.
    "full": {"assignment.policy": "full"},
}


def choose(*names: str) -> Axis:
    """Some of the methods, in the order given."""
    return {name: METHODS[name] for name in names}
