"""Kinds of devices: tiers and their properties."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from flexmoe_jax.errors import InputError
from flexmoe_jax.reading import read_text

_MOST_BYTES = 2**20
# Times and capacities computed from figures in this range stay finite.
_SMALLEST, _LARGEST = 1e-30, 1e30


class Profile(NamedTuple):
    """A kind of device. `inf` means no limit.

    Attributes:
      name: name of the tier.
      memory: bytes that training may use.
      speed: training examples per second.
      down: bytes per second from the server.
      up: bytes per second to the server.
      availability: share of rounds, in [0, 1], in which the device can be reached.
    """

    name: str
    memory: float
    speed: float
    down: float
    up: float
    availability: float


def check_profile(profile: Profile) -> Profile:
    """Check a profile, and return it unchanged.

    Raises:
      InputError: if a figure is not valid; names the figure, as in `edge.tiers.sensor.memory`.
    """
    for figure, value in zip(profile._fields[1:], profile[1:], strict=True):
        field = f"edge.tiers.{profile.name}.{figure}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(field, value, "give a number")
        if figure == "availability":
            if not 0 <= value <= 1:
                raise InputError(field, value, "give a share of rounds, from 0 to 1")
        elif value != value or value <= 0:
            raise InputError(field, value, "give a number above 0 (inf for no limit)")
        elif value != math.inf and not _SMALLEST <= value <= _LARGEST:
            remedy = f"give a number from {_SMALLEST:g} to {_LARGEST:g} (inf for no limit)"
            raise InputError(field, value, remedy)
    return profile


def read_tiers(path: str | Path | Traversable) -> Mapping[str, Profile]:
    """Read tiers from a TOML file with one table for each tier, such as the shipped `tiers.toml`.

    Args:
      path: path of the file.

    Returns:
      Read-only mapping from the tier's name to its profile, in the file's order.

    Raises:
      InputError: if there is no such file, it is not TOML, or a figure is missing, unknown or not
        valid.
    """
    try:
        if isinstance(path, str | Path):
            text = read_text(os.path.expanduser(path), _MOST_BYTES)
        else:
            text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except RecursionError as error:
        raise InputError("edge.tiers", path, "is nested too deeply for a file of tiers") from error
    except (OSError, ValueError) as error:  # ValueError: unreadable, or not TOML
        raise InputError("edge.tiers", path, f"give a TOML file of tiers ({error})") from error
    figures = Profile._fields[1:]
    tiers = {}
    for name, table in tables.items():
        if not isinstance(table, dict) or set(table) != set(figures):
            given = ", ".join(table) if isinstance(table, dict) else table
            raise InputError(f"edge.tiers.{name}", given, f"give exactly {', '.join(figures)}")
        tiers[name] = check_profile(Profile(name, **table))
    if not tiers:
        raise InputError("edge.tiers", path, "describe at least one tier, as [name]")
    return MappingProxyType(tiers)


TIERS: Mapping[str, Profile] = read_tiers(resources.files(__package__) / "tiers.toml")
"""The shipped tiers: `sensor`, `phone` and `gateway`. The file gives the source of each figure."""
