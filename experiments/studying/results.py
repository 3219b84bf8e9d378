"""Reads the results of the runs of a study."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.reporting.runs import Floats, Run, different_data, read_run
from experiments.studying.status import OTHER, UNKNOWN, Record, read_record, read_status
from experiments.studying.study import Trial, choose_reference
from experiments.workdir import RECORD
from flexmoe_jax.errors import InputError

ACCURACIES = ("personal", "global", "server")
FURTHER = ("assembled", "tuned", "newcomer")
BALANCES = ("assigned", "usage")
# The metric that must reach the target: the clients' own models on the whole test set, a measure
# that favours no kind of method.
TARGETED = "eval/global_accuracy"
CLOCK = "time/simulated_seconds"


@dataclass(frozen=True)
class Result:
    """One run of a study.

    Attributes:
      trial: the run as the study asks for it.
      status: its status; see `RunStatus`.
      run: contents of its folder; None if there are none, or they belong to another run.
    """

    trial: Trial
    status: str
    run: Run | None

    @property
    def finished(self) -> Run | None:
        """The run if it is finished, else None."""
        return self.run if self.status == "finished" else None


@dataclass(frozen=True)
class Results:
    """All runs of a study, done or not.

    Attributes:
      name: name of the study.
      folder: folder of the study.
      results: one result for each run that the study asks for, in the study's order.
      chosen: method that the study compares all others with; may be empty, see `Study`.
    """

    name: str
    folder: Path
    results: tuple[Result, ...]
    chosen: str = ""

    def reference(self, given: str = "") -> str:
        """Returns the method that all others are compared with: `given`, else the study's choice.

        Raises:
          InputError: the study has no such method.
        """
        return choose_reference(given or self.chosen, self.methods, "--reference")

    @property
    def methods(self) -> list[str]:
        """Methods, in the study's order."""
        return list(dict.fromkeys(result.trial.method for result in self.results))

    @property
    def seeds(self) -> list[int]:
        """Seeds, in the study's order."""
        return list(dict.fromkeys(result.trial.seed for result in self.results))

    @property
    def axes(self) -> list[str]:
        """Names of the further axes."""
        return [axis for axis, _ in self.results[0].trial.variant] if self.results else []

    @property
    def tasks(self) -> list[tuple[str, str]]:
        """Pairs of data set and partition, in the study's order."""
        return list(dict.fromkeys((r.trial.dataset, r.trial.partition) for r in self.results))

    @property
    def missing(self) -> list[Result]:
        """Runs that are not finished."""
        return [result for result in self.results if result.finished is None]

    @property
    def notes(self) -> list[str]:
        """Sentences on data left out and other things to know, each with the runs it concerns."""
        runs = {r.trial.name: r.run for r in self.results if r.run is not None}
        about: dict[str, list[str]] = {}
        for name, run in runs.items():
            for note in run.notes:
                about.setdefault(note, []).append(name)
        said = [
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {note}"
            for note, names in about.items()
        ]
        return [*different_data(runs), *said]

    def of(self, task: tuple[str, str]) -> dict[tuple[tuple[str, ...], str], dict[int, Run]]:
        """Returns the finished runs of a data set and partition.

        They are a mapping of (names of the variant, method) to seed to run. Combinations without a
        finished run are in it, with no seeds.
        """
        found: dict[tuple[tuple[str, ...], str], dict[int, Run]] = {}
        for result in self.results:
            trial = result.trial
            if (trial.dataset, trial.partition) == task:
                key = tuple(name for _, name in trial.variant), trial.method
                seeds = found.setdefault(key, {})
                if result.finished is not None:
                    seeds[trial.seed] = result.finished
        return found


def is_study(folder: Path) -> bool:
    """Whether the folder is that of a sweep: it holds a study.json."""
    return os.path.isfile(folder / RECORD)


def read_results(folder: Path) -> Results:
    """Reads a study's folder, finished or not.

    Raises:
      InputError: the folder holds no study.
    """
    record = read_record(folder)
    results = [_read(trial, folder / trial.name, record) for trial in record.trials]
    return Results(record.name, folder, tuple(results), record.reference)


def _read(trial: Trial, at: Path, record: Record) -> Result:
    if Path(trial.name).is_absolute() or ".." in Path(trial.name).parts:
        return Result(trial, "not in the study's folder", None)
    status = read_status(at, record.fields_of(trial)).status
    if status in ("new", OTHER, UNKNOWN):
        return Result(trial, status, None)
    try:
        return Result(trial, status, read_run(at))
    except InputError as error:  # The folder holds only a summary, or cannot be listed.
        return Result(trial, error.remedy, None)


def figures(run: Run, target: float) -> Mapping[str, float]:
    """Returns the numbers of a finished run that the tables show.

    Args:
      run: a finished run.
      target: client-global accuracy to reach, in [0, 1].

    Returns:
      - `personal/final`, `personal/best`, the same for `global` and `server`, and `mean/final`, the
        mean of the three final values: accuracies in [0, 1]; no mean where clients have rules of
        their own, since personal accuracy then is by these, and the others by all rules;
      - `personal/p10`: personal accuracy of the client at the tenth percentile; `assembled/final`:
        accuracy of all experts in one model; `tuned/final`: of clients after one more round of
        training, each for itself; `newcomer/final`: of clients that have not trained;
      - `personal_loss/final`, and the same for the other words: losses as recorded, in nats;
      - `assigned/round`, `assigned/cumulative`, `usage/round`, `usage/cumulative`: coefficients of
        variation over experts: the mean over rounds, and for the load summed over all rounds;
      - `down/bytes`, `up/bytes`: bytes of the whole run to and from the clients; missing if rounds
        were lost;
      - `target/rounds`, `target/bytes` (both ways) and `target/seconds` (simulated): the cost of
        reaching the target; missing if it was not reached;
      - `wall/seconds`: wall time of the whole run.
      Values that the run did not record, or that are not finite, are missing.
    """
    found: dict[str, float | None] = {}
    for word in ACCURACIES:
        found[f"{word}/final"] = run.final(f"eval/{word}_accuracy")
        found[f"{word}/best"] = run.best(f"eval/{word}_accuracy")
    final = [found[f"{word}/final"] for word in ACCURACIES]
    known = [value for value in final if value is not None]
    found["personal/p10"] = run.final("eval/personal_accuracy_p10")
    for word in FURTHER:
        found[f"{word}/final"] = run.final(f"eval/{word}_accuracy")
    for word in (*ACCURACIES, *FURTHER):
        found[f"{word}_loss/final"] = run.final(f"eval/{word}_loss")
    by_one_rule = run.config.get("partition.rule", "none") == "none"
    found["mean/final"] = _mean(known) if len(known) == len(ACCURACIES) and by_one_rule else None
    # A single expert has no balance; runs of older versions recorded 0.
    for word in BALANCES if run.config.get("model.experts") != 1 else ():
        _, each = run.series(f"load/{word}_cv")
        found[f"{word}/round"] = _mean(each) if each.size else None
        found[f"{word}/cumulative"] = run.final(f"load/{word}_cv_cumulative")
    for word in ("down", "up"):
        _, total = run.cumulative(f"comm/bytes_{word}")
        whole = total.size and run.complete(run.records[-1]["round"])
        found[f"{word}/bytes"] = float(total[-1]) if whole else None
    found |= _until(run, target)
    found["wall/seconds"] = run.seconds()
    return {k: value for k, value in found.items() if value is not None and math.isfinite(value)}


def _mean(values: Sequence[float] | Floats) -> float:
    # The mean of infinities of both signs is NaN, without a warning.
    with np.errstate(invalid="ignore"):
        return float(np.mean(values))


def _until(run: Run, target: float) -> dict[str, float | None]:
    """Returns rounds, bytes and simulated seconds up to the first evaluation at the target."""
    rounds, accuracy = run.series(TARGETED)
    reached = rounds[accuracy >= target]
    if not reached.size:
        return {}
    first = float(reached[0])
    if not run.complete(first):  # A lost round may have reached it first, and cost bytes.
        return {}
    return {
        "target/rounds": first,
        "target/bytes": _total_at(first, *run.cumulative("comm/bytes_down", "comm/bytes_up")),
        "target/seconds": _total_at(first, *run.cumulative(CLOCK)),
    }


def _total_at(number: float, rounds: Floats, total: Floats) -> float | None:
    until = total[rounds <= number]
    return float(until[-1]) if until.size and math.isfinite(until[-1]) else None
