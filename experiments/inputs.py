"""The inputs of a run beside its config: the data and the user's files.

A run is continued only with the same inputs. Their hashes are in the run's folder, in inputs.json.
A run may thus be moved together with its data, but is not continued on data that replaced them.
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
    """Returns whether two values of a field may name the same file, so that its hash decides."""
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    both = {one, other}
    return (
        (field == "data.name" and all(name.endswith(".npz") for name in both))
        or (field == "edge.tiers" and "" not in both)
        or (field == "edge.availability" and both.isdisjoint(AVAILABILITIES))
    )


def read_inputs(folder: Path) -> dict[str, str] | None:
    """Reads the hashes in a run's folder; None if there are none, as in an older run.

    Raises:
      UnreadableError: the file is damaged.
      OSError: the operating system denies access.
    """
    try:
        content = read_json(folder / FILE)
    except FileNotFoundError:
        return None
    # A hash over all hashes, so that a damaged file does not look like changed data.
    if content.pop("all", None) != _of_all(content):
        raise UnreadableError("is damaged")
    return content


def inputs_text(inputs: Mapping[str, str]) -> str:
    """Returns the content of inputs.json."""
    return json.dumps({**inputs, "all": _of_all(inputs)}, indent=2) + "\n"


def _of_all(inputs: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def check_inputs(
    folder: Path, known: Mapping[str, str], config: ConfigDict, inputs: Mapping[str, str]
) -> None:
    """Refuses to continue a run on data other than those it began with.

    Args:
      folder: folder of the run.
      known: hashes of the inputs that the run began with.
      config: config of the continued run.
      inputs: hashes of the inputs that the run would continue with.

    Raises:
      InputError: naming the input that differs.
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
