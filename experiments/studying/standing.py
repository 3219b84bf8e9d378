"""How far the runs of a study are, what they cost, and the record of what the study asks for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from experiments.studying.study import Study, Trial
from experiments.workdir import write_atomically
from flexmoe_jax.errors import InputError

RECORD = "study.json"
# Ends that starting the run again would not change.
ENDED = ("finished", "diverged")


class Standing(NamedTuple):
    """How far a run is.

    Attributes:
      status: `new`, `unfinished`, or how summary.json says that it ended.
      seconds: wall time so far, where summary.json says it.
    """

    status: str
    seconds: float | None = None


def standing(folder: Path) -> Standing:
    """Reads how far the run in a folder is, whether or not it is going."""
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        return Standing(str(summary["status"]), float(summary["seconds"]))
    except FileNotFoundError:
        return Standing("unfinished" if (folder / "config.json").exists() else "new")
    except (ValueError, TypeError, KeyError):
        return Standing("unfinished")


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


def write_record(study: Study, workdir: Path) -> None:
    """Writes study.json: the study's name and all its runs, done or not.

    Raises:
      InputError: the folder belongs to another study.
    """
    path = workdir / RECORD
    if path.exists():
        there, _ = read_record(workdir)
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
        }
        for trial in study.trials()
    ]
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"name": study.name, "runs": trials}, indent=1) + "\n")


def read_record(workdir: Path) -> tuple[str, list[Trial]]:
    """The name of the study in a folder, and the runs that it asks for, without their overrides.

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
            )
            for run in record["runs"]
        ]
        return record["name"], trials
    except FileNotFoundError:
        remedy = "holds no study.json; give the --workdir of a sweep"
        raise InputError("DIR", workdir, remedy) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        remedy = f"its {RECORD} cannot be read; start the sweep again, which writes it anew"
        raise InputError("DIR", workdir, remedy) from error
