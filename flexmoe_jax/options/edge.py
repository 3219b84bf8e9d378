"""Options of devices, links and availability."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.options.record import Options, option


@dataclass(frozen=True)
class EdgeOptions(Options, section="edge"):
    """The clients' devices, and how they affect a round."""

    mix: str = option(
        "",
        "tiers and their weights, as sensor:2,phone:1,gateway:1; empty for none, and then no "
        "simulated time",
    )
    tiers: str = option("", "a TOML file of tiers; empty for flexmoe_jax/edge/tiers.toml")
    availability: str = option("always", "always | independent | markov | a file of 0 and 1")
    mean_on_rounds: float = option(5.0, "of markov: how long a client stays", least=1)
    over_select: float = option(
        1.0,
        "clients asked, over clients wanted; a round ends with the last one wanted that delivers",
        least=1,
    )
    deadline: float = option(0.0, "simulated seconds after which a round ends; 0 for none", least=0)
    late: str = option("drop", "what becomes of clients at work then", choices=("drop", "partial"))
    dropout_before: float = option(
        0.0, "probability of being gone before the download", least=0, most=1
    )
    dropout_during: float = option(0.0, "probability that the work never arrives", least=0, most=1)
    cache: bool = option(True, "whether an expert that a client still has is not sent again")
