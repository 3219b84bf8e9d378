"""Find prepared data sets in TFDS's layout: `<data folder>/<name>[/<config>]/<version>/`.

The search does not need TFDS. So a missing data set is reported at once, and a data set that is not
registered with TFDS is found like any other.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import NamedTuple

from flexmoe_jax.errors import InputError
from flexmoe_jax.reading import UnreadableError, read_json

EMBEDDED = "digits"

_NAME = re.compile(
    r"(?P<base>\w[\w-]*)(/(?P<config>(?!\d+\.\d+\.\d+$)\w[\w.+-]*))?"
    r"([:/](?P<version>(\d+|\*)(\.(\d+|\*)){2}))?"
)
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class Reference(NamedTuple):
    """The parts of a data set's name.

    Attributes:
      base: the builder's name.
      config: the builder's configuration, or "" for its default one.
      version: `major.minor.patch`, where `*` matches any number, or "" for the newest.
    """

    base: str
    config: str
    version: str


def parse(name: str) -> Reference:
    """Parse `base[/config][:version]`, for example `emnist/digits` or `cifar10:3.0.2`."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError("data.name", name, "write it as name, name/config, name:1.2.3 or file.npz")
    return Reference(match["base"], match["config"] or "", match["version"] or "")


def data_folder(data_dir: str | os.PathLike[str] | None) -> Path:
    """Return the data folder: the given one, else TFDS's default."""
    given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(os.path.expanduser(given))


def find(folder: Path, reference: Reference) -> Path | None:
    """Return the newest prepared version folder that matches the reference, or None."""
    home = folder / reference.base
    if reference.config:
        home = home / reference.config
    elif not _versions(home):
        home = home / _default_config(home)
    wanted = reference.version.replace(".", r"\.").replace("*", r"\d+") or _VERSION.pattern
    fitting = [path for path in _versions(home) if re.fullmatch(wanted, path.name)]
    return fitting[-1] if fitting else None


def prepared(folder: Path) -> list[str]:
    """Return the sorted names, with configs, of the data sets prepared in a folder."""
    names = []
    for base in _folders(folder):
        if _versions(base):
            names.append(base.name)
        names += [f"{base.name}/{path.name}" for path in _folders(base) if _versions(path)]
    return sorted(names)


def missing(name: str, reference: Reference, folder: Path) -> InputError:
    """Return the error for a data set that is not in the folder; it says what to do."""
    remedies = "point data.dir at a folder with a prepared copy, or set data.download=true"
    there = prepared(folder)
    near = _near(name, [*there, EMBEDDED])
    hint = f"did you mean {' or '.join(near)}? Else " if near else ""
    if not folder.is_dir():
        if near:
            return InputError(
                "data.name", name, f"{hint}the folder {folder} is missing: {remedies}"
            )
        return InputError("data.dir", folder, f"no such folder to read {name} from: {remedies}")
    versions = _versions(folder / reference.base / reference.config)
    if reference.version and versions:
        held = ", ".join(path.name for path in versions)
        return InputError("data.name", name, f"{folder} holds its versions {held}: {remedies}")
    held = f"which holds {', '.join(there)}" if there else "which holds no prepared data set"
    return InputError("data.name", name, f"{hint}it is not in {folder}, {held}: {remedies}")


def _near(name: str, known: list[str]) -> list[str]:
    """Return up to three known names similar to the given one, with or without config."""
    spellings: dict[str, list[str]] = {}
    for item in known:
        for spelling in (item.lower(), item.partition("/")[0].lower()):
            spellings.setdefault(spelling, []).append(item)
    alike = difflib.get_close_matches(name.lower(), spellings, n=3, cutoff=0.7)
    return list(dict.fromkeys(item for spelling in alike for item in spellings[spelling]))[:3]


def _versions(home: Path) -> list[Path]:
    """Return the complete version folders of one data set, oldest first."""
    found = [
        path
        for path in _folders(home)
        if _VERSION.fullmatch(path.name)
        and (path / "features.json").is_file()
        and (path / "dataset_info.json").is_file()
    ]
    return sorted(found, key=lambda path: [int(part) for part in path.name.split(".")])


def _folders(folder: Path) -> list[Path]:
    """Return the subfolders of a folder; none if it cannot be listed."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except (OSError, ValueError):  # ValueError: a name that contains a null character.
        return []


def _default_config(home: Path) -> str:
    """Return the configuration that TFDS recorded as a builder's default, or ""."""
    try:
        noted = read_json(home / ".config" / "metadata.json")["default_config_name"]
    except (OSError, UnreadableError, KeyError):
        return ""
    # Accept a plain name only, so that the path cannot leave the folder.
    return noted if isinstance(noted, str) and re.fullmatch(r"\w[\w.+-]*", noted) else ""
