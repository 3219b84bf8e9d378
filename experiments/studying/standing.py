"""How far the runs of a study are, what they cost, and the record of what the study asks for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from experiments.studying.study import Study, Trial
from experiments.workdir import Workdir, differing, write_atomically
from flexmoe_jax.errors import InputError

RECORD = "study.json"
# Ends that starting the run again would not change.
ENDED = ("finished", "diverged")
# Of a folder whose run is not, or not yet, the one that the study asks for.
OTHER = "other config"


class Standing(NamedTuple):
    """How far a run is.

    Attributes:
      status: `new`, `other config`, `unfinished`, or how summary.json says that it ended.
      seconds: wall time so far, where summary.json says it.
    """

    status: str
    seconds: float | None = None


def standing(folder: Path, asked: Mapping[str, Any]) -> Standing:
    """Reads how far the run in a folder is, whether or not it is going.

    Args:
      folder: of the run.
      asked: the flat config that the run is to have; empty for whichever it has.
    """
    if asked and not _may_be(folder, asked):
        return Standing(OTHER)
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        return Standing(str(summary["status"]), float(summary["seconds"]))
    except FileNotFoundError:
        return Standing("unfinished" if (folder / "config.json").exists() else "new")
    except (ValueError, TypeError, KeyError):
        return Standing("unfinished")


def _may_be(folder: Path, asked: Mapping[str, Any]) -> bool:
    """Whether a folder holds the run asked for, or none at all yet."""
    if not (folder / "config.json").exists():
        return not (folder / "summary.json").exists()
    try:
        return not differing(Workdir(folder).config(), asked)
    except InputError:
        return False


class Cost(NamedTuple):
    """What runs will take.

    Attributes:
      seconds: of those of a data set that has finished runs, one after the other.
      unknown: number of the other runs.
    """

    seconds: float
    unknown: int


def cost(left: Iterable[Trial], spent: Mapping[str, list[float]]) -> Cost:
    """Estimates what runs will take from the mean of the finished ones of the same data set.

    Args:
      left: runs to be done.
      spent: data set to the seconds of its finished runs.
    """
    each = [mean(spent[trial.dataset]) if spent.get(trial.dataset) else None for trial in left]
    return Cost(sum(s for s in each if s is not None), each.count(None))


class Record(NamedTuple):
    """What study.json says that a study asks for.

    Attributes:
      name: of the study.
      reference: the method that all others are compared with; may be empty, see `Study`.
      trials: all runs, done or not.
      fields: the flat config that `overrides` of a run change; empty in an older file.
    """

    name: str
    reference: str
    trials: list[Trial]
    fields: Mapping[str, Any]

    def fields_of(self, trial: Trial) -> dict[str, Any]:
        """The flat config of a run; empty where the file does not say."""
        return {**self.fields, **trial.overrides} if self.fields else {}


def write_record(study: Study, workdir: Path) -> None:
    """Writes study.json: the study's name and all its runs, done or not, with their configs.

    Raises:
      InputError: the folder belongs to another study.
    """
    path = workdir / RECORD
    if path.exists():
        there = read_record(workdir).name
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
    """What the study in a folder asks for.

    Raises:
      InputError: the folder holds no study.
    """
    try:
        record = json.loads((workdir / RECORD).read_text("utf-8"))
        trials = [
            Trial(
                run["dataset"],
                run["partition"],
                tuple(run["variant"].items()),
                run["method"],
                run["seed"],
                dict(run.get("overrides", {})),
            )
            for run in record["runs"]
        ]
        fields = dict(record.get("config", {}))
        return Record(record["name"], record.get("reference", ""), trials, fields)
    except FileNotFoundError:
        remedy = "holds no study.json; give the --workdir of a sweep"
        raise InputError("DIR", workdir, remedy) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        remedy = f"its {RECORD} cannot be read; start the sweep again, which writes it anew"
        raise InputError("DIR", workdir, remedy) from error
