"""Options of the task: what is learnt."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.options.record import Options, option


@dataclass(frozen=True)
class TaskOptions(Options, section="task"):
    """The task."""

    name: str = option("classification", "classification | next_token")
