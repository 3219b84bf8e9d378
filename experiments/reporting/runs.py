"""Reads the results of a training run from its workdir; the run need not be finished."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.fields import load_model_name
from experiments.reporting.quantities import LOSS_UNITS, UNNAMED, LossUnit, better
from experiments.reporting.run_files import (
    Numbers,
    read_arrays,
    read_data,
    read_object,
    read_records,
    read_summary,
)
from experiments.workdir import flatten, incidental
from flexmoe_jax.errors import InputError, printable
from flexmoe_jax.reading import is_number

Floats = NDArray[np.float64]

NAMED_FIELDS = 3


@dataclass(frozen=True)
class Run:
    """The contents of one workdir.

    Attributes:
      workdir: folder that the run was read from.
      config: flat configuration: dotted field to value.
      summary: contents of summary.json; empty while the run is in progress.
      records: one mapping for each round of metrics.jsonl, ascending in `round`.
      arrays: entries of arrays.npz under the names and axes of `ARRAY_AXES`.
      notes: sentences: the run's own notes, and what could not be read.
      data: hash of the training and test data; empty if the folder does not record it.
    """

    workdir: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    records: tuple[Mapping[str, Any], ...] = ()
    arrays: Mapping[str, Numbers] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    data: str = ""

    @property
    def status(self) -> str:
        """How the run ended according to summary.json; `unfinished` if it does not say."""
        return str(self.summary.get("status", "unfinished"))

    @property
    def rounds(self) -> int:
        """Number of rounds recorded, `T`."""
        return len(self.records)

    @property
    def task(self) -> str:
        """Name of the task; configs written before there were other tasks: classification."""
        return str(self.config.get("task.name", "classification"))

    @property
    def loss_unit(self) -> LossUnit:
        """Unit in which its losses are shown."""
        return LOSS_UNITS.get(self.task, UNNAMED)

    @property
    def units(self) -> str:
        """Name of the units that gates send to experts."""
        return "tokens" if self.task == "next_token" else "samples"

    @property
    def kind(self) -> str:
        """What the classes of arrays.npz are, of which each client has a mix: label or domain."""
        return "domain" if self.task == "next_token" else "label"

    def complete(self, last: float) -> bool:
        """Whether every round up to number `last` is recorded."""
        return sum(record["round"] <= last for record in self.records) >= last

    def series(self, key: str) -> tuple[Floats, Floats]:
        """Returns round numbers and values, both (T',), of the rounds with the scalar `key`."""
        pairs = [(r["round"], r[key]) for r in self.records if is_number(r.get(key))]
        x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
        return x, y

    def cumulative(self, *keys: str) -> tuple[Floats, Floats]:
        """Returns round numbers and running total, both (T',), of the sum of `keys`.

        Rounds without any of the keys are left out; a single missing or infinite value counts as 0.
        """
        present = [r for r in self.records if any(is_number(r.get(key)) for key in keys)]
        x = np.array([r["round"] for r in present], dtype=float)
        each = [sum(_finite(r.get(key)) for key in keys) for r in present]
        return x, np.cumsum(np.array(each, dtype=float))

    def vectors(self, key: str) -> tuple[Floats, Floats]:
        """Returns the rounds (T',) that recorded the vector `key`, and its values (T', E).

        Values that are not finite become NaN.
        """
        found = {r["round"]: r[key] for r in self.records if isinstance(r.get(key), list)}
        if not found:
            return np.empty(0), np.empty((0, 0))
        x = np.array(list(found), dtype=float)
        rows = np.array(list(found.values()), dtype=float)
        return x, np.where(np.isfinite(rows), rows, np.nan)

    def final(self, key: str) -> float | None:
        """Returns the final value of the metric `key`: from the summary, else the last recorded."""
        stated = self.summary.get(f"final/{key}")
        if is_number(stated):
            return float(stated)
        _, y = self.series(key)
        return float(y[-1]) if y.size else None

    def best(self, key: str) -> float | None:
        """Returns the best value of the metric `key`: from the summary, else the best recorded.

        None if there is no value, or if neither higher nor lower is better.
        """
        stated = self.summary.get(f"best/{key}")
        if is_number(stated):
            return float(stated)
        _, y = self.series(key)
        y = y[np.isfinite(y)]
        side = better(key)
        if not y.size or not side:
            return None
        return float(y.max() if side == "higher" else y.min())

    def best_round(self, key: str) -> int | None:
        """Returns the first round that recorded the best value; None if no round did."""
        best = self.best(key)
        x, y = self.series(key)
        if best is None or not y.size:
            return None
        hits = np.flatnonzero(np.isclose(y, best, rtol=1e-6, atol=0))
        return int(x[hits[0]]) if hits.size else None

    def seconds(self) -> float | None:
        """Returns the wall time in seconds, from the summary or the last round, if that is later.

        Runs of older versions recorded only the time of each round; these times are summed.
        """
        _, so_far = self.series("time/run_seconds")
        stated = [self.summary.get("seconds"), *so_far[-1:]]
        if numbers := [float(value) for value in stated if is_number(value)]:
            return max(numbers)
        _, total = self.cumulative("time/round_seconds")
        return float(total[-1]) if total.size else None


def read_run(workdir: Path) -> Run:
    """Reads one workdir; parts that are damaged are left out and noted.

    Raises:
      InputError: the folder is no workdir: neither config.json nor metrics.jsonl is in it.
    """
    if not _is_workdir(workdir):
        raise InputError("DIR", workdir, _remedy(workdir))
    notes: list[str] = []
    config = flatten(read_object(workdir / "config.json", notes))
    summary = read_summary(workdir / "summary.json", notes)
    records = read_records(workdir / "metrics.jsonl", config.get("rounds"), notes)
    arrays = read_arrays(workdir / "arrays.npz", notes)
    data = read_data(workdir, notes)
    said: list[str] = summary.get("notes", [])
    return Run(workdir, config, summary, records, arrays, (*said, *notes), data)


def differing_fields(runs: Sequence[Run]) -> list[str]:
    """Returns the config fields in which the experiments differ, in the order of the configs."""
    fields = dict.fromkeys(f for run in runs for f in run.config if not incidental(f))
    absent = object()
    return [
        f for f in fields if any(r.config.get(f, absent) != runs[0].config.get(f) for r in runs)
    ]


def name_runs(runs: Sequence[Run]) -> list[str]:
    """Returns a distinct name for each run: the config fields that differ, else its folder."""
    # The seed, which only numbers repetitions, comes after the fields that are compared.
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


def different_data(runs: Mapping[str, Run]) -> list[str]:
    """Returns a warning for each group of runs that ask for the same data but read different data.

    Args:
      runs: name to run.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for name, run in runs.items():
        asked = {f: v for f, v in run.config.items() if f.startswith("data.") and not incidental(f)}
        asked["data.name"] = data = json_text(asked.get("data.name", ""))
        if data.endswith(".npz"):  # The folder of a user's file does not matter.
            asked["data.name"] = os.path.basename(data)
        if run.data:
            read = groups.setdefault(json.dumps(asked, sort_keys=True), {})
            read.setdefault(run.data, []).append(name)
    return [
        f"Not all runs of {json.loads(asked)['data.name']} read the same data: those of "
        + "; of ".join(
            names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            for names in read.values()
        )
        + " differ. What is compared across them says little."
        for asked, read in groups.items()
        if len(read) > 1
    ]


def json_text(value: Any) -> str:
    """Formats a config value as on the command line; strings without quotes."""
    return printable(value if isinstance(value, str) else json.dumps(value, default=str))


def _folder_names(workdirs: Sequence[Path]) -> list[str]:
    """Returns the shortest path endings that distinguish the folders."""
    resolved = [w.resolve() for w in workdirs]
    for depth in range(1, max(len(w.parts) for w in resolved) + 1):
        names = ["/".join(w.parts[-depth:]) for w in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(w) for w in resolved]


def _finite(value: object) -> float:
    return float(value) if is_number(value) and math.isfinite(value) else 0.0


def _is_workdir(path: Path) -> bool:
    return any(os.path.isfile(path / name) for name in ("config.json", "metrics.jsonl"))


def _remedy(path: Path) -> str:
    if not os.path.exists(path):
        return "no such folder; give the --workdir of a training run"
    if not os.path.isdir(path):
        return "not a folder; give the --workdir of a training run"
    try:
        inside = sum(_is_workdir(child) for child in path.iterdir() if child.is_dir())
    except OSError as error:
        return f"cannot be listed ({error.strerror}); give the --workdir of a training run"
    if inside:
        return f"holds no run itself but {inside} below it; give {path}/*"
    return "neither config.json nor metrics.jsonl is there; give the --workdir of a training run"


def common_unit(runs: Sequence[Run]) -> LossUnit:
    """Returns the unit for the losses of all these runs; as recorded if their units differ."""
    units = {run.loss_unit for run in runs}
    return units.pop() if len(units) == 1 else LossUnit("as recorded", 1.0)


ASSIGNED_UNITS = {
    "clients": "holders",
    "samples": "samples that holders train on",
    "usage": "{units} that holders are expected to send it",
}
"""Load model to what the assigned load of an expert counts."""


def assigned_unit(run: Run) -> str:
    """Returns what the run's assigned load counts."""
    load = str(run.config.get("assignment.load", "clients"))
    try:
        load = load_model_name(load, run.config.get("clients.capacity", 1))
    except InputError:  # The config has an invalid capacity.
        load = ""
    return ASSIGNED_UNITS.get(load, ASSIGNED_UNITS["clients"]).format(units=run.units)
