"""Options of the assignment: which client holds which expert."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.options.record import Options, option

# Larger values overflow in sums over many clients.
_LARGEST = 1e100
LOAD_MODELS = ("clients", "samples", "usage")


@dataclass(frozen=True)
class AssignmentOptions(Options, section="assignment"):
    """The assignment of experts."""

    policy: str = option(
        "flex", "or greedy, greedy_usage, random, round_robin, static, full, or one of your own"
    )
    layers: str = option(
        "same",
        "whether an expert is a column through all MoE layers, or each layer is assigned by itself",
        choices=("same", "each"),
    )
    solver: str = option("auto", "see docs/assignment.md")
    load: str = option(
        "auto",
        "what load is: clients (holders), samples or usage (that holders train on, or are foreseen "
        "to send the expert); or auto: clients where capacities are equal, usage where they differ",
        choices=("auto", *LOAD_MODELS),
    )
    slack: float = option(
        0.1, "δ: by how much of the mean load an expert's load may miss it", least=0, most=_LARGEST
    )
    deficit_decay: float = option(
        1.0, "1 never forgets what an expert was owed, 0 always does", least=0, most=1
    )
    rounding: str = option("repair", "repair | shmoys_tardos, where loads are weighted")
    backend: str = option("HIGHS", "CVXPY solver of relaxations, of those installed")
    holders_min: int = option(0, "least holders of every expert", least=0)
    balance: float = option(
        0.0, "price of the squared distance of loads from their target", least=0, most=_LARGEST
    )
    diversity: float = option(
        0.0, "price of holders whose label mix differs from all clients'", least=0, most=_LARGEST
    )
    movement: float = option(
        0.0, "price of sending an expert to a client that does not have it", least=0, most=_LARGEST
    )
    exploration: float = option(
        1.0,
        "width of the noise on the fitness, drawn anew every round: holders that stay would teach "
        "an expert their few classes alone; 0, with local.balance 0 and private gates, is the "
        "paper's",
        least=0,
        most=_LARGEST,
    )
    exploration_rounds: int = option(
        0, "in which that width falls to 0 along a line; 0 for never", least=0
    )
    time_limit: float = option(
        60.0, "seconds of a solver; then even loads; 0 for none", least=0, most=_LARGEST
    )
