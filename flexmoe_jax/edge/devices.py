"""Assign kinds of devices to clients.

Axis legend: `C` clients.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from flexmoe_jax.edge.profiles import TIERS, Profile, check_profile
from flexmoe_jax.errors import InputError

# Separates the order of the devices from other draws of the same seed.
_STREAM = 0xDEA1
_MIX_HINT = "give name:weight pairs, as sensor:2,phone:1"


class Devices(NamedTuple):
    """The clients' devices, with one array for each property.

    Attributes:
      names: names of the tiers.
      tier: (C,) int, index into `names`.
      memory: (C,) bytes that training may use.
      speed: (C,) training examples per second.
      down: (C,) download speed, bytes per second.
      up: (C,) upload speed, bytes per second.
      availability: (C,) share of rounds in which the device can be reached, in [0, 1].
    """

    names: tuple[str, ...]
    tier: np.ndarray
    memory: np.ndarray
    speed: np.ndarray
    down: np.ndarray
    up: np.ndarray
    availability: np.ndarray

    @property
    def tiers(self) -> np.ndarray:
        """Names of the clients' tiers, (C,)."""
        return np.array(self.names)[self.tier]


def parse_mix(text: str) -> dict[str, float]:
    """Parse a mix of tiers, for example `sensor:2,phone:1`; a name alone has weight 1.

    Args:
      text: `name:weight` pairs, separated by commas.

    Returns:
      Tier name -> weight, in the order of the text.

    Raises:
      InputError: if a pair cannot be read, or a tier occurs twice.
    """
    mix: dict[str, float] = {}
    for pair in text.split(","):
        name, colon, number = (part.strip() for part in pair.partition(":"))
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            raise InputError("edge.mix", text, f"{number!r} is no weight: {_MIX_HINT}") from None
        if not name:
            raise InputError("edge.mix", text, f"a tier has no name: {_MIX_HINT}")
        if name in mix:
            raise InputError("edge.mix", text, f"give {name} once, with its whole weight")
        mix[name] = weight
    return mix


def deal_devices(
    mix: Mapping[str, float], clients: int, seed: int, tiers: Mapping[str, Profile] = TIERS
) -> Devices:
    """Assign devices to the clients in the proportions of a mix.

    The number of clients of each tier is not random: it is `C · weight / Σ weights`, rounded by
    largest remainder (ties go to the first). Only the order of the clients is drawn.

    Args:
      mix: tier name -> weight of at least 0.
      clients: C, at least 1.
      seed: seed of the draw.
      tiers: tier name -> profile.

    Returns:
      The clients' devices, with the tiers of the mix.

    Raises:
      InputError: if a tier is unknown, a weight is negative or not finite, or all weights are 0.
    """
    if clients < 1:
        raise InputError("clients.count", clients, "give at least 1")
    for name, weight in mix.items():
        if name not in tiers:
            near = difflib.get_close_matches(name, tiers, n=1, cutoff=0)[0]
            remedy = f"no such tier; did you mean {near}? choose among {', '.join(tiers)}"
            raise InputError("edge.mix", name, remedy)
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError("edge.mix", f"{name}:{weight}", "give a finite weight of at least 0")
    if not sum(mix.values()) > 0:
        raise InputError("edge.mix", dict(mix), "give at least one tier a weight above 0")
    profiles = [check_profile(tiers[name]) for name in mix]
    counts = _largest_remainder(np.array(list(mix.values()), np.float64), clients)
    generator = np.random.default_rng([seed, _STREAM])
    tier = generator.permutation(np.repeat(np.arange(len(profiles)), counts))
    figures = np.array([profile[1:] for profile in profiles], np.float64)
    return Devices(tuple(mix), tier, *figures[tier].T)


def _largest_remainder(weight: np.ndarray, total: int) -> np.ndarray:
    """Divide `total` in proportion to weights (n,) into whole numbers (n,)."""
    part = weight / weight.max()  # The sum of large weights may be infinite.
    quota = total * (part / part.sum())
    whole = np.floor(quota + 1e-9).astype(np.int64)  # 2.9999999999 is a 3 with rounding error
    remainder = np.round(quota - whole, 9)
    winners = np.argsort(-remainder, kind="stable")[: total - int(whole.sum())]
    whole[winners] += 1
    return whole
