"""Reads the files of a workdir; unusable content is left out, and a note says so.

The result is clean: numbers are floats or ints small enough to be added, squared and drawn, texts
are one printable line, and the shapes of the arrays fit each other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.history import missing_rounds, read_history
from experiments.inputs import FILE, read_inputs
from experiments.reporting.quantities import QUANTITIES, counted
from flexmoe_jax.errors import printable
from flexmoe_jax.npz import open_npz
from flexmoe_jax.reading import UnreadableError, is_number, read_json

Numbers = NDArray[Any]

# Axes of each entry of arrays.npz.
ARRAY_AXES = {
    "label_counts": "CY",
    "classes": "Y",
    "capacity": "C",
    "fitness": "CE",
    "holds": "CE",
    "held_rounds": "CE",
    "usage": "CE",
}
# Metrics that are vectors, with one number for each expert, and the one that is a text.
VECTORS = ("load/assigned", "load/usage")
STATUS = "assignment/status"
# The largest value and the largest count that are accepted: no run comes near either, and the
# square of the first is still finite.
_LARGEST, _MOST_COUNTED = 1e100, 1e15
# The most rows (experts or classes) that a picture may have.
_MOST_ROWS = 4096
_LONGEST, _MOST_NOTES = 200, 20
# Prefixes of summary entries that are numbers, and the names of some that are texts.
_FIGURES = ("final/", "best/", "total/")
_WORDS = ("status", "device", "personal_measured_on", "notes")
_TEXT_KINDS, _NUMBER_KINDS = "US", "biuf"


def read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """Reads the object in a JSON file; empty if there is no file, or it cannot be read."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, UnreadableError) as error:
        notes.append(f"{path.name} could not be read and is left out ({reason(error)}).")
        return {}


def read_summary(path: Path, notes: list[str]) -> dict[str, Any]:
    """Reads summary.json, without values of the wrong kind."""
    found: dict[str, Any] = {}
    wrong = 0
    for key, value in read_object(path, notes).items():
        number = key.startswith(_FIGURES) or key in ("seconds", "rounds")
        if is_number(value) and key not in _WORDS:
            found[printable(key, _LONGEST)] = figure(value)
        elif isinstance(value, str) and not number:
            found[printable(key, _LONGEST)] = printable(value, _LONGEST)
        elif key == "versions" and isinstance(value, Mapping):
            found[key] = {printable(k, _LONGEST): printable(v, _LONGEST) for k, v in value.items()}
        elif key == "notes" and isinstance(value, list):
            found[key] = [printable(v) for v in value[:_MOST_NOTES] if isinstance(v, str)]
        else:
            wrong += number or key in _WORDS
    if wrong:
        notes.append(_wrong_kind(path, wrong))
    return found


def read_records(path: Path, rounds: object, notes: list[str]) -> tuple[Mapping[str, Any], ...]:
    """Reads the rounds in metrics.jsonl, without values of the wrong kind.

    Args:
      path: path of the file.
      rounds: number of rounds of the whole run, if its config says.
      notes: list to which notes are appended.
    """
    try:
        history = read_history(path, rounds)
    except (OSError, UnreadableError) as error:
        notes.append(f"{path.name} could not be read and is left out ({reason(error)}).")
        return ()
    rows, wrong = _of_right_kind([dict(row) for row in history.rows])
    for many, said in (
        (history.unread, "Lines of {} that could not be read and are left out: {}."),
        (history.repeated, "Lines of {} about rounds that later lines tell again: {}."),
    ):
        if many:
            notes.append(said.format(path.name, many))
    if wrong:
        notes.append(_wrong_kind(path, wrong))
    lost = missing_rounds(history.rows, history.last)
    if lost:
        notes.append(f"{path.name} lacks {counted(lost, 'round')}: totals and means are without.")
    return rows


def _wrong_kind(path: Path, many: int) -> str:
    return f"Values in {path.name} that are of the wrong kind and are left out: {many}."


def _of_right_kind(rows: list[dict[str, Any]]) -> tuple[tuple[dict[str, Any], ...], int]:
    """Removes values of the wrong kind for their key, and counts those of known keys."""
    lengths = {key: Counter(len(r[key]) for r in rows if _is_vector(r.get(key))) for key in VECTORS}
    usual = {key: count.most_common(1)[0][0] for key, count in lengths.items() if count}
    wrong, clean = 0, []
    for row in rows:
        kept = {"round": row.pop("round")}
        for key, value in row.items():
            if key in VECTORS:
                if _is_vector(value) and len(value) == usual[key]:
                    kept[key] = [figure(number) for number in value]
            elif is_number(value) and key != STATUS:
                kept[key] = figure(value)
            elif isinstance(value, str) and key not in QUANTITIES:
                kept[key] = printable(value, _LONGEST)
            wrong += key not in kept and (key in QUANTITIES or key in (*VECTORS, STATUS))
        clean.append(kept)
    return tuple(clean), wrong


def _is_vector(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_ROWS and all(map(is_number, value))


def figure(value: float) -> float:
    """Returns the number, or an infinity if it is larger than any that a run records."""
    if value > _LARGEST:
        return math.inf
    return -math.inf if value < -_LARGEST else value


def read_arrays(path: Path, notes: list[str]) -> dict[str, Numbers]:
    """Reads the usable entries of arrays.npz, under the names and axes of `ARRAY_AXES`."""
    arrays: dict[str, Numbers] = {}
    try:
        with open_npz(path) as archive:
            for name in ARRAY_AXES:
                if name in archive:
                    try:
                        arrays[name] = _fit_to_draw(name, archive.read(name))
                    except UnreadableError as error:
                        notes.append(f"{path.name} is without {name}: {reason(error)}.")
    except FileNotFoundError:
        return {}
    except (OSError, UnreadableError) as error:
        notes.append(f"{path.name} could not be read and is left out ({reason(error)}).")
        return {}
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        axes = ARRAY_AXES[name]
        expected = tuple(
            sizes.get(axis, size) for axis, size in zip(axes, array.shape, strict=True)
        )
        if array.shape != expected:
            notes.append(
                f"{path.name} is left out: {name} has shape {array.shape}, which does not fit "
                f"({', '.join(axes)})."
            )
            return {}
        sizes |= dict(zip(axes, array.shape, strict=True))
    return arrays


def read_data(folder: Path, notes: list[str]) -> str:
    """Returns a hash of the data that a run read; empty if its folder does not record it."""
    try:
        known = read_inputs(folder) or {}
    except (OSError, UnreadableError) as error:
        notes.append(f"{FILE} could not be read and is left out ({reason(error)}).")
        return ""
    return " ".join(str(known[name]) for name in sorted(known) if name.startswith("data."))


def _fit_to_draw(name: str, array: Numbers) -> Numbers:
    """Returns the array with printable texts, and with NaN for fitness values too large to draw.

    Raises:
      UnreadableError: shape, type or values do not fit the entry of this name.
    """
    axes = ARRAY_AXES[name]
    if array.ndim != len(axes) or not array.size:
        raise UnreadableError(f"it has shape {array.shape}, which is not ({', '.join(axes)})")
    if any(size > _MOST_ROWS for axis, size in zip(axes, array.shape, strict=True) if axis != "C"):
        raise UnreadableError(f"its shape {array.shape} is more than can be drawn")
    if name == "classes":
        if array.dtype.kind not in _TEXT_KINDS + _NUMBER_KINDS:
            raise UnreadableError(f"it holds {array.dtype}, not names")
        known = np.char.decode(array, "utf-8", "replace") if array.dtype.kind == "S" else array
        return np.array([printable(text, _LONGEST) for text in known.tolist()])
    if array.dtype.kind not in _NUMBER_KINDS:
        raise UnreadableError(f"it holds {array.dtype}, not numbers")
    with np.errstate(over="ignore"):
        array = array.astype(np.float64) if array.dtype.kind == "f" else array
    if name == "fitness":
        return np.where(np.abs(array) <= _LARGEST, array, np.nan)
    if not ((array >= 0) & (array <= _MOST_COUNTED)).all():
        raise UnreadableError("it holds numbers that count nothing")
    return array


def reason(error: Exception) -> str:
    """Returns a text that says why a file could not be read."""
    said = error.strerror if isinstance(error, OSError) else None
    return printable(said or error, _LONGEST)
