"""Simulate edge devices: their memory, their availability, and the duration of a round."""

from __future__ import annotations

from flexmoe_jax.edge.availability import (
    AVAILABILITIES,
    Availability,
    always,
    independent,
    make_availability,
    markov,
    read_record,
    trace,
)
from flexmoe_jax.edge.capacity import experts_in_memory
from flexmoe_jax.edge.devices import Devices, deal_devices, parse_mix
from flexmoe_jax.edge.dropouts import draw_dropouts
from flexmoe_jax.edge.profiles import TIERS, Profile, check_profile, read_tiers
from flexmoe_jax.edge.timing import Attempt, Outcome, attempt, run_attempt

__all__ = [
    "AVAILABILITIES",
    "TIERS",
    "Attempt",
    "Availability",
    "Devices",
    "Outcome",
    "Profile",
    "always",
    "attempt",
    "check_profile",
    "deal_devices",
    "draw_dropouts",
    "experts_in_memory",
    "independent",
    "make_availability",
    "markov",
    "parse_mix",
    "read_record",
    "read_tiers",
    "run_attempt",
    "trace",
]
