"""Options for real clients over a network."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.options.record import Options, option


@dataclass(frozen=True)
class DeployOptions(Options, section="deploy"):
    """How long a round waits for real clients; a simulation does not use these options."""

    deadline: float = option(
        600.0, "seconds after which a round goes on without those who have not answered", least=1
    )
    absence: float = option(
        60.0, "seconds that a round waits for clients that are not there", least=0
    )
    quota: float = option(
        1.0, "part of the clients asked whose answers close a round", least=0, most=1
    )
