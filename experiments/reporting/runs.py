"""Reads what a training run left in its workdir, finished or not."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.fields import load_model_name
from experiments.reporting.quantities import better
from experiments.workdir import flatten, incidental
from flexmoe_jax.errors import InputError

Floats = NDArray[np.float64]
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
NAMED_FIELDS = 3


@dataclass(frozen=True)
class Run:
    """One workdir, read.

    Attributes:
      workdir: where it was read from.
      config: configuration, flat: dotted field to value.
      summary: contents of summary.json, empty while the run is going.
      records: one mapping a round from metrics.jsonl, ascending in `round`, one for each round.
      arrays: entries of arrays.npz under the names and axes of `ARRAY_AXES`.
      notes: sentences on what the run said of its data, and on what could not be read.
    """

    workdir: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    records: tuple[Mapping[str, Any], ...] = ()
    arrays: Mapping[str, Numbers] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """What summary.json says of the run's end, or `unfinished` where there is none."""
        return str(self.summary.get("status", "unfinished"))

    @property
    def rounds(self) -> int:
        """Number of rounds recorded, `T`."""
        return len(self.records)

    def series(self, key: str) -> tuple[Floats, Floats]:
        """Round numbers and values, both (T',), of the rounds that recorded the scalar `key`."""
        pairs = [(r["round"], _number(r[key])) for r in self.records if key in r]
        x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
        return x, y

    def cumulative(self, *keys: str) -> tuple[Floats, Floats]:
        """Round numbers and running total, both (T,), of the sum of `keys`; gaps count as 0."""
        present = [r for r in self.records if any(key in r for key in keys)]
        x = np.array([r["round"] for r in present], dtype=float)
        each = [sum(np.nan_to_num(_number(r.get(key))) for key in keys) for r in present]
        return x, np.cumsum(np.array(each, dtype=float))

    def vectors(self, key: str) -> tuple[Floats, Floats]:
        """First to last round (T,) and the vector `key` of each (T, E); NaN where it is missing."""
        found = {r["round"]: r[key] for r in self.records if isinstance(r.get(key), list)}
        if not found:
            return np.empty(0), np.empty((0, 0))
        x = np.arange(min(found), max(found) + 1)
        experts = max(len(v) for v in found.values())
        rows = np.full((len(x), experts), np.nan)
        for number, vector in found.items():
            rows[number - x[0], : len(vector)] = [_number(v) for v in vector]
        return x.astype(float), rows

    def final(self, key: str) -> float | None:
        """Last value of the metric `key`: the summary's, else the last one recorded."""
        stated = self.summary.get(f"final/{key}")
        if isinstance(stated, int | float):
            return float(stated)
        _, y = self.series(key)
        return float(y[-1]) if y.size else None

    def best(self, key: str) -> float | None:
        """Best value of the metric `key`, None for metrics without a better side."""
        stated = self.summary.get(f"best/{key}")
        if isinstance(stated, int | float):
            return float(stated)
        _, y = self.series(key)
        y = y[np.isfinite(y)]
        side = better(key)
        if not y.size or not side:
            return None
        return float(y.max() if side == "higher" else y.min())

    def best_round(self, key: str) -> int | None:
        """First round in which the best value was recorded, None where no round shows it."""
        best = self.best(key)
        x, y = self.series(key)
        if best is None or not y.size:
            return None
        hits = np.flatnonzero(np.isclose(y, best, rtol=1e-6, atol=0))
        return int(x[hits[0]]) if hits.size else None

    def seconds(self) -> float | None:
        """Wall time in seconds: the summary's, else the sum over the rounds."""
        stated = self.summary.get("seconds")
        if isinstance(stated, int | float):
            return float(stated)
        _, total = self.cumulative("time/round_seconds")
        return float(total[-1]) if total.size else None


def read_run(workdir: Path) -> Run:
    """Reads one workdir; parts that are missing or cut short are left out and noted.

    Raises:
      InputError: if the folder is no workdir: neither config.json nor metrics.jsonl is in it.
    """
    if not _is_workdir(workdir):
        raise InputError("DIR", workdir, _remedy(workdir))
    notes: list[str] = []
    config = _read_object(workdir / "config.json", notes)
    summary = _read_object(workdir / "summary.json", notes)
    said = summary.get("notes")
    notes += [note for note in said if isinstance(note, str)] if isinstance(said, list) else []
    return Run(
        workdir=workdir,
        config=flatten(config),
        summary=summary,
        records=_read_records(workdir / "metrics.jsonl", notes),
        arrays=_read_arrays(workdir / "arrays.npz", notes),
        notes=tuple(notes),
    )


def differing_fields(runs: Sequence[Run]) -> list[str]:
    """Config fields that tell the experiments apart, in the configs' order."""
    fields = dict.fromkeys(f for run in runs for f in run.config if not incidental(f))
    absent = object()
    return [
        f for f in fields if any(r.config.get(f, absent) != runs[0].config.get(f) for r in runs)
    ]


def name_runs(runs: Sequence[Run]) -> list[str]:
    """One distinct name for each run: what differs in its config, else its folder."""
    # What is compared comes before the repetition of it.
    fields = sorted(differing_fields(runs), key=lambda f: f == "seed")
    folders = _folder_names([run.workdir for run in runs])
    if not 0 < len(fields) <= NAMED_FIELDS:
        return folders
    short = [f.rsplit(".", 1)[-1] for f in fields]
    shown = [s if short.count(s) == 1 else f for s, f in zip(short, fields, strict=True)]
    names = [
        ", ".join(
            f"{s} {json_text(run.config[f])}"
            for s, f in zip(shown, fields, strict=True)
            if f in run.config
        )
        for run in runs
    ]
    return [
        name if name and names.count(name) == 1 else " · ".join(filter(None, (name, folder)))
        for name, folder in zip(names, folders, strict=True)
    ]


def json_text(value: Any) -> str:
    """A config value as one writes it on the command line; strings without quotes."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _folder_names(workdirs: Sequence[Path]) -> list[str]:
    """Shortest path endings that tell the folders apart."""
    resolved = [w.resolve() for w in workdirs]
    for depth in range(1, max(len(w.parts) for w in resolved) + 1):
        names = ["/".join(w.parts[-depth:]) for w in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(w) for w in resolved]


def _number(value: Any) -> float:
    return math.nan if value is None or isinstance(value, str) else float(value)


def _is_workdir(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "metrics.jsonl"))


def _remedy(path: Path) -> str:
    if not path.exists():
        return "no such folder; give the --workdir of a training run"
    if not path.is_dir():
        return "not a folder; give the --workdir of a training run"
    inside = sum(_is_workdir(child) for child in path.iterdir() if child.is_dir())
    if inside:
        return f"holds no run itself but {inside} below it; give {path}/*"
    return "neither config.json nor metrics.jsonl is there; give the --workdir of a training run"


ASSIGNED_UNITS = {
    "clients": "holders",
    "samples": "samples that holders train on",
    "usage": "samples that holders are foreseen to send it",
}
"""What the load assigned to an expert counts, by load model."""


def assigned_unit(run: Run) -> str:
    """What the run's assigned load counts."""
    load = str(run.config.get("assignment.load", "clients"))
    load = load_model_name(load, run.config.get("clients.capacity", 1))
    return ASSIGNED_UNITS.get(load, ASSIGNED_UNITS["clients"])


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} could not be read and is left out.")
        return {}
    return content


def _read_records(path: Path, notes: list[str]) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    by_round: dict[int, Mapping[str, Any]] = {}
    unread = 0
    lines = path.read_text("utf-8", errors="replace").split("\n")
    for line in filter(str.strip, lines[:-1]):
        unread += not _add_record(line, by_round)
    # What follows the last newline may be cut short while the run is writing: no reason to warn.
    _add_record(lines[-1], by_round)
    if unread:
        notes.append(f"Lines of {path.name} that could not be read and are left out: {unread}.")
    return tuple(by_round[number] for number in sorted(by_round))


def _add_record(line: str, by_round: dict[int, Mapping[str, Any]]) -> bool:
    """Adds one line; a round written again after a resume replaces the earlier one."""
    try:
        record = json.loads(line)
        by_round[int(record["round"])] = {**record, "round": int(record["round"])}
    except (ValueError, TypeError, KeyError):
        return False
    return True


def _read_arrays(path: Path, notes: list[str]) -> dict[str, Numbers]:
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ARRAY_AXES if name in archive}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        notes.append(f"{path.name} could not be read and is left out.")
        return {}
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        axes = ARRAY_AXES[name]
        expected = tuple(sizes.get(a, n) for a, n in zip(axes, array.shape, strict=False))
        if len(axes) != array.ndim or array.shape != expected:
            notes.append(
                f"{path.name} is left out: {name} has shape {array.shape}, which does not fit "
                f"({', '.join(axes)})."
            )
            return {}
        sizes |= dict(zip(axes, array.shape, strict=True))
    return arrays
