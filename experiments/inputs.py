"""What a run reads beside its config: the data and the user's files. It goes on with these alone.

Their hashes lie in the run's folder, as inputs.json, so that a run may be moved with its data, and
is not continued on others that have taken their place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from flexmoe_jax.edge import AVAILABILITIES
from flexmoe_jax.errors import InputError
from flexmoe_jax.reading import UnreadableError, read_json

FILE = "inputs.json"


def may_have_moved(field: str, one: object, other: object) -> bool:
    """Whether two values of a field may name one file in two places, so that its hash decides."""
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    both = {one, other}
    return (
        (field == "data.name" and all(name.endswith(".npz") for name in both))
        or (field == "edge.tiers" and "" not in both)
        or (field == "edge.availability" and both.isdisjoint(AVAILABILITIES))
    )


def read_inputs(folder: Path) -> dict[str, str] | None:
    """The hashes in a run's folder; None where there are none, as of an older run.

    Raises:
      UnreadableError: the file is damaged.
      OSError: the system does not let us read it.
    """
    try:
        content = read_json(folder / FILE)
    except FileNotFoundError:
        return None
    # A hash of the hashes: a changed bit of theirs must not look like changed data.
    if content.pop("all", None) != _of_all(content):
        raise UnreadableError("is damaged")
    return content


def inputs_text(inputs: Mapping[str, str]) -> str:
    """The content of inputs.json."""
    return json.dumps({**inputs, "all": _of_all(inputs)}, indent=2) + "\n"


def _of_all(inputs: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def check_inputs(
    folder: Path, known: Mapping[str, str], config: ConfigDict, inputs: Mapping[str, str]
) -> None:
    """Refuses to go on with a run on other data than it began with.

    Args:
      folder: of the run.
      known: hashes of what it began with.
      config: of the run as it is to go on.
      inputs: hashes of what it would go on with.

    Raises:
      InputError: naming what differs.
    """
    changed = [n for n in sorted({*known, *inputs}) if known.get(n) != inputs.get(n)]
    if not changed:
        return
    arrays = [name.removeprefix("data.") for name in changed if name.startswith("data.")]
    field = "data.name" if arrays else changed[0]
    said = f"its {', '.join(arrays)} differ from those that" if arrays else "differs from what"
    remedy = (
        f"{said} the run in {folder} began with; put them back, or choose another folder (to go on "
        f"all the same, delete {FILE} there)"
    )
    group, name = field.split(".")
    raise InputError(field, config[group][name], remedy)
