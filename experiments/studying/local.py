"""Runs a share of a study on this machine, one run after the other."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.children import Runner
from experiments.fields import check_fields
from experiments.locks import lock
from experiments.report import write_report
from experiments.reporting.quantities import counted, duration, show
from experiments.reporting.runs import read_run
from experiments.studying.launch import AS_CHILD, as_typed, command, last_line
from experiments.studying.status import (
    ENDED,
    OTHER,
    UNKNOWN,
    RunStatus,
    cost,
    read_status,
    write_record,
)
from experiments.studying.study import Study, Trial, read_study
from experiments.table import write_tables
from experiments.workdir import CONFIG, Workdir
from flexmoe_jax.errors import InputError

_POLL_SECONDS = 0.5
HEADLINE = ("personal", "global", "server")


@dataclass(frozen=True)
class Sweep:
    """The runs of a study that are to be executed, and their folder.

    Attributes:
      study: file of the study.
      workdir: folder of the study.
      data_dir: folder of the data; empty for the one that the study sets.
      only: shell pattern that the names of runs must match.
      index: index of this share of the runs, from 0.
      count: number of shares; each run belongs to exactly one share.
    """

    study: str
    workdir: str
    data_dir: str = ""
    only: str = "*"
    index: int = 0
    count: int = 1

    def load(self) -> tuple[Study, list[Trial]]:
        """Reads the study and selects the runs of this share.

        Raises:
          InputError: an attribute, or the study, cannot be used.
        """
        if not self.workdir:
            raise InputError("--workdir", self.workdir, "name a folder for the study")
        if os.path.lexists(Path(self.workdir) / CONFIG):
            remedy = (
                f"holds a run ({CONFIG}); a study's runs have folders in the study's own: name one"
            )
            raise InputError("--workdir", self.workdir, remedy)
        if self.count < 1:
            raise InputError("--count", self.count, "choose 1 or more")
        if not 0 <= self.index < self.count:
            raise InputError("--index", self.index, f"give 0 to {self.count - 1}")
        study = read_study(self.study)
        trials = study.trials()
        if self.data_dir:
            where = {"data.dir": self.data_dir}
            trials = [replace(t, overrides={**t.overrides, **where}) for t in trials]
        for trial in trials:
            try:
                check_fields(study.config_of(trial))
            except InputError as error:
                remedy = f"{error.remedy} (run {trial.name})"
                raise InputError(error.field, error.value, remedy) from error
        if not share(trials, self.only, 0, 1):
            raise InputError("--only", self.only, f"matches no run; one is {trials[0].name}")
        return study, share(trials, self.only, self.index, self.count)


def share(trials: Sequence[Trial], only: str, index: int, count: int) -> list[Trial]:
    """Selects the runs whose name matches, and of these every `count`-th from `index` on."""
    return [trial for trial in trials if fnmatchcase(trial.name, only)][index::count]


def log_of(folder: Path) -> Path:
    """Returns the run's log, beside its folder; the sweep that executes the run locks this file."""
    return folder.with_name(folder.name + ".log")


def dry_run(sweep: Sweep) -> int:
    """Prints the runs that are done, the commands of the others, and the time these will take.

    Returns:
      exit code: 0; or 2 if a run would reject its config, even without looking at data.
    """
    study, trials = sweep.load()
    workdir, code = Path(sweep.workdir), 0
    for trial in trials:
        status = _status_of(study, trial, workdir).status
        if status in ENDED:
            print(f"{status}: {trial.name}")
        elif why := _rejected(study.config_of(trial)):
            code = 2
            print(f"refused: {trial.name}: {why}")
        else:
            print(f"{status}: {as_typed(command(study, trial, workdir))}")
    print(_remaining(study, trials, trials, workdir))
    return code


def _rejected(config: ConfigDict) -> str:
    """Returns why a run would reject its config; empty if it does not, or needs data to tell."""
    from experiments.build import make_parts  # Imports JAX, which a sweep leaves to its runs.

    try:
        make_parts(config)
    except InputError as error:
        return str(error)
    return ""


def run(sweep: Sweep) -> int:
    """Executes the runs that are not done yet, then writes the study's tables and page.

    Args:
      sweep: what to run. Runs that another sweep is executing are left to it. If the sweep of a
        run was killed, the run is about to end, and this sweep waits for it.

    Returns:
      exit code: 0; or 1 if a run failed or diverged; or 128 + the number of the signal that ended
      the sweep.

    Raises:
      InputError: nothing can be run.
    """
    study, trials = sweep.load()
    workdir = Path(sweep.workdir)
    with lock(workdir / "sweep.lock", wait=True):
        write_record(study, workdir)
    print(f"{study.name}: {_remaining(study, trials, trials, workdir)}", flush=True)
    ends: dict[str, list[str]] = defaultdict(list)
    with Runner() as runner:
        for end in _ends(study, trials, workdir, runner):
            ends[end.kind].append(f"{end.name}: {end.words}")
    for line in ends["failed"]:
        print(f"failed: {line}")
    elsewhere = [trial for trial in trials if f"{trial.name}: " in ends["elsewhere"]]
    left = [t for t in elsewhere if _status_of(study, t, workdir).status not in ENDED]
    if left:
        print(f"{counted(len(left), 'run')} not done yet: another sweep is at work there")
    # If all runs have another config, the folder may have a table of theirs, which is out of date.
    told = ("finished", OTHER, UNKNOWN)
    if any(_status_of(study, t, workdir).status in told for t in study.trials()):
        with lock(workdir / "sweep.lock", wait=True):
            print(f"table: {write_tables(workdir)[0]} · page: {write_report([workdir])}")
    if runner.caught:
        print("interrupted; the same command goes on from here")
        return 128 + runner.caught
    return 1 if ends["failed"] else 0


class End(NamedTuple):
    """How a run ended in this sweep.

    Attributes:
      name: name of the run.
      kind: `finished`, `failed`, `interrupted`, `elsewhere` if another sweep is executing it, or
        `busy` if another process that is no sweep is at work in its folder.
      words: text to print about it.
      started: whether this sweep started it.
    """

    name: str
    kind: str
    words: str = ""
    started: bool = False


def _ends(study: Study, trials: Sequence[Trial], workdir: Path, runner: Runner) -> Iterator[End]:
    """Tries every run once, busy ones last, and yields how each of them ended."""
    untried, busy = list(trials), list[Trial]()
    while (untried or busy) and not runner.caught:
        waits = not untried
        trial = busy.pop(0) if waits else untried.pop(0)
        if waits:
            print(f"{trial.name}: waiting for the process that is at work there", flush=True)
            while Workdir(workdir / trial.name).busy() and not runner.caught:
                time.sleep(_POLL_SECONDS)
        end = _attempt(study, trial, workdir, runner)
        if end.kind == "busy":
            busy.append(trial)
            continue
        if end.started and end.kind != "interrupted":
            rest = _remaining(study, trials, [*untried, *busy], workdir)
            print(f"{trial.name}: {end.words} · {rest}", flush=True)
        yield end


def _attempt(study: Study, trial: Trial, workdir: Path, runner: Runner) -> End:
    folder, name = workdir / trial.name, trial.name
    try:
        Workdir(folder).check(study.config_of(trial))
    except InputError as error:
        return End(name, "failed", str(error))
    path = log_of(folder)
    with lock(path) as held:
        if held is None:
            return End(name, "elsewhere")
        before = _status_of(study, trial, workdir).status
        if before in ENDED:
            done = before == "finished"
            return End(name, "finished") if done else End(name, "failed", _diverged(path))
        if Workdir(folder).busy():
            return End(name, "busy")
        begin, start = time.monotonic(), path.stat().st_size
        # Opened again: a child that outlives a killed sweep must not hold the sweep's lock.
        with path.open("ab") as log:
            code, _ = runner.run([*command(study, trial, workdir), *AS_CHILD], log)
        seconds = time.monotonic() - begin
    after = _status_of(study, trial, workdir)
    if after.status == "finished" and code == 0:
        words = f"{duration(seconds)} · {_headline(folder)}"
        return End(name, "finished", words, started=True)
    if runner.caught:
        return End(name, "interrupted", started=True)
    if after.status == "diverged":
        return End(name, "failed", _diverged(path), started=True)
    said = last_line(path, start) or "it said nothing"
    return End(name, "failed", f"{_ended_by(code)}: {said}", started=True)


def _ended_by(code: int) -> str:
    # A run that saves before a signal ends it exits with 128 + the signal's number.
    number = -code if code < 0 else code - 128
    with suppress(ValueError):
        return f"ended by {signal.Signals(number).name}"
    return f"exit code {code}"


def _status_of(study: Study, trial: Trial, workdir: Path) -> RunStatus:
    return read_status(workdir / trial.name, study.fields_of(trial))


def _diverged(log: Path) -> str:
    return f"diverged, see {log}; to try again, delete its folder"


def _headline(folder: Path) -> str:
    run = read_run(folder)
    measure = "accuracy" if run.task == "classification" else "loss"
    keys = {word: f"eval/{word}_{measure}" for word in HEADLINE}
    said = (f"{word} {show(key, run.final(key), run.loss_unit)}" for word, key in keys.items())
    return " · ".join(said)


def _remaining(
    study: Study, trials: Sequence[Trial], untried: Sequence[Trial], workdir: Path
) -> str:
    """Describes how many runs are done, how many untried ones are left, and their time."""
    # Finished runs of the study's other shares count for the estimate, too.
    every = {trial.name: _status_of(study, trial, workdir) for trial in study.trials()}
    spent = defaultdict(list)
    for trial in study.trials():
        status, seconds = every[trial.name]
        if status == "finished" and seconds is not None:
            spent[trial.dataset].append(seconds)
    done = sum(every[trial.name].status == "finished" for trial in trials)
    left = [trial for trial in untried if every[trial.name].status not in ENDED]
    said = f"{counted(done, 'run')} done, {len(left)} left"
    if not left:
        return said
    seconds, unknown = cost(left, spent)
    if unknown == len(left):
        return f"{said}, time unknown"
    rest = f" and {counted(unknown, 'run')} unknown" if unknown else ""
    return f"{said}, about {duration(seconds)}{rest}"
