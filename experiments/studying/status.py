"""Status and estimated cost of a study's runs, and study.json, which lists all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from experiments.studying.study import Study, Trial
from experiments.workdir import CONFIG, RECORD, Workdir, differing, write_atomically
from flexmoe_jax.errors import InputError, printable
from flexmoe_jax.reading import UnreadableError, is_number, read_json

# Final statuses: starting the run again would not change them.
ENDED = ("finished", "diverged")
# Status of a folder whose run is not, or not yet, the one that the study asks for.
OTHER = "other config"
# Status of a folder whose config cannot be read, so that its run is not known.
UNKNOWN = "config.json cannot be read"
# The largest size of study.json, in bytes; it has a few hundred bytes for each run.
_MOST_BYTES = 2**26


class RunStatus(NamedTuple):
    """Status of a run.

    Attributes:
      status: `new`, `other config`, `config.json cannot be read`, `unfinished`, or the final status
        in summary.json.
      seconds: wall time so far, if summary.json gives it.
    """

    status: str
    seconds: float | None = None


def read_status(folder: Path, asked: Mapping[str, Any]) -> RunStatus:
    """Reads the status of the run in a folder, whether or not it is in progress.

    Args:
      folder: folder of the run.
      asked: the flat config that the run must have; empty to accept any config.
    """
    other = _other(folder, asked) if asked else ""
    if other:
        return RunStatus(other)
    try:
        summary = read_json(folder / "summary.json")
    except FileNotFoundError:
        return RunStatus("unfinished" if os.path.exists(folder / CONFIG) else "new")
    except (OSError, UnreadableError):
        return RunStatus("unfinished")
    status, seconds = summary.get("status"), summary.get("seconds")
    known = is_number(seconds) and 0 <= seconds < float("inf")
    return RunStatus(
        printable(status, 60) if isinstance(status, str) else "unfinished",
        float(seconds) if is_number(seconds) and known else None,
    )


def _other(folder: Path, asked: Mapping[str, Any]) -> str:
    """Returns why a folder holds another run than asked for; empty if it does not."""
    if not os.path.exists(folder / CONFIG):
        return OTHER if os.path.exists(folder / "summary.json") else ""
    try:
        return OTHER if differing(Workdir(folder).config(), asked) else ""
    except (OSError, InputError):
        return UNKNOWN


class Cost(NamedTuple):
    """Estimated cost of runs.

    Attributes:
      seconds: total time of the runs whose data set has finished runs, one after the other.
      unknown: number of the other runs.
    """

    seconds: float
    unknown: int


def cost(left: Iterable[Trial], spent: Mapping[str, list[float]]) -> Cost:
    """Estimates the time of runs as the mean over the finished runs of the same data set.

    Args:
      left: runs still to do.
      spent: data set to the seconds of its finished runs.
    """
    each = [mean(spent[trial.dataset]) if spent.get(trial.dataset) else None for trial in left]
    return Cost(sum(s for s in each if s is not None), each.count(None))


class Record(NamedTuple):
    """Contents of study.json: the runs that a study asks for.

    Attributes:
      name: name of the study.
      reference: the method that all others are compared with; may be empty, see `Study`.
      trials: all runs, done or not.
      fields: the flat config that the `overrides` of a run change; empty for an older file.
    """

    name: str
    reference: str
    trials: list[Trial]
    fields: Mapping[str, Any]

    def fields_of(self, trial: Trial) -> dict[str, Any]:
        """Returns the flat config of a run; empty if the file does not give it."""
        return {**self.fields, **trial.overrides} if self.fields else {}


def write_record(study: Study, workdir: Path) -> None:
    """Writes study.json: the study's name and all its runs, done or not, with their configs.

    Raises:
      InputError: the folder belongs to another study.
    """
    path = workdir / RECORD
    if os.path.lexists(path):
        try:
            there = read_record(workdir).name
        except InputError:  # The file is damaged, and is written again.
            there = study.name
        if there != study.name:
            remedy = f"holds the study {there}, not {study.name}; choose another folder"
            raise InputError("--workdir", workdir, remedy)
    trials = [
        {
            "folder": trial.name,
            "dataset": trial.dataset,
            "partition": trial.partition,
            "variant": dict(trial.variant),
            "method": trial.method,
            "seed": trial.seed,
            "overrides": dict(trial.overrides),
        }
        for trial in study.trials()
    ]
    record = {
        "name": study.name,
        "reference": study.reference,
        "config": study.fields,
        "runs": trials,
    }
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def read_record(workdir: Path) -> Record:
    """Reads study.json from the folder of a study.

    Raises:
      InputError: the folder holds no study.
    """
    try:
        record = read_json(workdir / RECORD, _MOST_BYTES)
        trials = list(dict.fromkeys(map(_trial, record["runs"])))
        name, reference = record["name"], record.get("reference", "")
        if not isinstance(name, str) or len({tuple(dict(t.variant)) for t in trials}) > 1:
            raise UnreadableError("has no name, or runs of several grids")
        known = reference if reference in {trial.method for trial in trials} else ""
        return Record(printable(name, 200), known, trials, dict(record.get("config", {})))
    except FileNotFoundError:
        remedy = "holds no study.json; give the --workdir of a sweep"
        raise InputError("DIR", workdir, remedy) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        remedy = f"its {RECORD} cannot be read; start the sweep again, which writes it anew"
        raise InputError("DIR", workdir, remedy) from error


def _trial(run: Mapping[str, Any]) -> Trial:
    """Reads a run from its entry in study.json, with printable names.

    Raises:
      TypeError: a part has the wrong type; or KeyError: a part is missing.
    """
    seed, overrides = run["seed"], run.get("overrides", {})
    if isinstance(seed, bool) or not isinstance(seed, int) or not isinstance(overrides, dict):
        raise TypeError("a seed is a whole number, and overrides have names")
    dataset, partition, method = (_name(run[key]) for key in ("dataset", "partition", "method"))
    variant = tuple((_name(axis), _name(name)) for axis, name in run["variant"].items())
    return Trial(dataset, partition, variant, method, seed, overrides)


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a name is a text")
    return printable(value, 200)
