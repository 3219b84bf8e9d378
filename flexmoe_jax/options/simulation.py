"""Options of the simulated clients: how many there are, and which faults they have."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.errors import InputError
from flexmoe_jax.options.record import Options, option


@dataclass(frozen=True)
class ClientsOptions(Options, section="clients"):
    """The clients."""

    # More clients do not fit into memory, or the run finds that out only after a long time.
    count: int = option(20, "C, how many", least=1, most=10_000_000)
    newcomers: int = option(
        0,
        "of these, kept out of training: drawn, then probed, given experts and tested at "
        "evaluations",
        least=0,
    )
    shortlist: int = option(
        0,
        "experts that a newcomer downloads to be probed, those that the routers give most of its "
        "examples to; 0 for all",
        least=0,
    )
    per_round: int = option(0, "P, those of a round; 0 for all that train", least=0)
    sampling: str = option(
        "uniform",
        "of a round's cohort; examples: in proportion to what clients have",
        choices=("uniform", "examples"),
    )
    capacity: object = option(
        "1-4",
        "k_c: a number (2), a range (1-4) or a list ([1, 2, 4]), dealt out evenly, at random; or "
        "memory: as many as each client's device has room for (needs edge.mix)",
        kind=object,
    )

    def __post_init__(self) -> None:
        """Refuses values that do not fit, and more clients per round than there are."""
        super().__post_init__()
        if self.newcomers >= self.count:
            remedy = (
                f"choose 0 to {self.count - 1}: of {self.count} clients at least one must train"
            )
            raise InputError("clients.newcomers", self.newcomers, remedy)
        training = self.count - self.newcomers
        if self.per_round > training:
            those = f"{training}, those of clients.count={self.count} that are no newcomers"
            if not self.newcomers:
                those = f"clients.count={training}"
            raise InputError(
                "clients.per_round", self.per_round, f"choose at most {those}, or 0 for all"
            )


@dataclass(frozen=True)
class FaultsOptions(Options, section="faults"):
    """Clients whose updates are all wrong."""

    share: float = option(0.0, "of the clients; above 0 at least one", least=0, most=1)
    kind: str = option(
        "nan",
        "nan; flip: turned around; scale: 1000 times too long; noise: added, 10 times as long",
        choices=("nan", "flip", "scale", "noise"),
    )
