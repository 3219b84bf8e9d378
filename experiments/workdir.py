"""The folder of a run: config.json, inputs.json, metrics.jsonl, summary.json, arrays.npz.

The folder also has checkpoints/ and report/. One process at a time works there, and meanwhile locks
the empty file run.lock. Files are replaced in one step, so a killed process or a full disk leaves
the old file or the new one. Only metrics.jsonl grows line by line; if some of its lines are
damaged, only these are lost.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.history import History, Metrics, missing_rounds, read_history
from experiments.inputs import FILE, check_inputs, inputs_text, may_have_moved, read_inputs
from experiments.locks import TakenError, take
from flexmoe_jax.errors import InputError, printable
from flexmoe_jax.reading import UnreadableError, is_number, read_json

_LOCK = "run.lock"
# What a run is, and what a study is; no folder holds both.
CONFIG, RECORD = "config.json", "study.json"

# Fields and groups of fields that say where and how a run is computed, not what. They may change
# when a run is moved and continued elsewhere.
INCIDENTAL = (
    "data.dir",
    "data.download",
    "execution",
    "eval.batch_size",
    "checkpoint",
    "deploy",
    "tensorboard",
)


def as_json(config: ConfigDict) -> dict[str, Any]:
    """Converts a config to plain JSON values."""
    plain: dict[str, Any] = json.loads(config.to_json())
    return plain


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Converts a nested mapping to a flat one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def incidental(field: str) -> bool:
    """Returns whether runs that differ only in this field are still the same experiment."""
    return any(field == name or field.startswith(f"{name}.") for name in INCIDENTAL)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns the sorted fields that make two flat configs different experiments.

    A missing field counts as None.
    """
    fields = sorted(one.keys() | other.keys())
    return [f for f in fields if not incidental(f) and one.get(f) != other.get(f)]


class Workdir:
    """The folder of one run; nothing is written before `open`.

    Args:
      path: path of the folder.
      writes: True in only one process of a run; the others read the files, and do not write.
    """

    def __init__(self, path: str | os.PathLike[str], writes: bool = True) -> None:
        """Stores the path; does not access the folder."""
        self.path = Path(path)
        self.writes = writes
        self._unlock: Callable[[], object] | None = None

    def keep_others_out(self, create: bool = True) -> None:
        """Locks the folder against other processes, for the lifetime of this object.

        Args:
          create: create the folder and the lock file if missing; otherwise a folder without a lock
            file is not changed.

        Raises:
          InputError: another process works in this folder.
          OSError: the folder cannot be written.
        """
        path = self.path / _LOCK
        if not self.writes or self._unlock or not (create or path.exists()):
            return
        if create:
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            file = take(path)
        except TakenError as error:
            remedy = "another process is at work here; wait for its end, or choose another folder"
            raise InputError("workdir", self.path, remedy) from error
        self._unlock = weakref.finalize(self, file.close)

    def busy(self) -> bool:
        """Returns whether another process works in this folder."""
        probe = Workdir(self.path)
        try:
            probe.keep_others_out(create=False)
        except InputError:
            return True
        if probe._unlock:
            probe._unlock()
        return False

    def check(self, config: ConfigDict) -> None:
        """Rejects a folder that holds another experiment, or files that are not of a run.

        Incidental fields may differ from those of the run in the folder. `rounds` may differ if
        some rounds are left and no learning rate was scheduled over the former number. The paths of
        files may differ if the folder holds their hashes: `check_inputs` compares these.

        Raises:
          InputError: naming the first field that differs.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError("workdir", self.path, "is a file; choose a folder")
        if (self.path / RECORD).exists():
            remedy = f"holds a study ({RECORD}); its runs have folders in it: choose another"
            raise InputError("workdir", self.path, remedy)
        existing = self._config_path
        if not existing.exists():
            # A process killed in `open` may leave its temporary file, and always the lock file.
            ours = (_temporary(existing), self.path / _LOCK)
            if any(path not in ours for path in self.path.iterdir()):
                remedy = "holds files but no run; choose an empty or a new folder"
                raise InputError("workdir", self.path, remedy)
            return
        there, here = self.config(), flatten(as_json(config))
        hashed = self._inputs()[0] is not None
        done = self.history().last
        for field in differing(there, here):
            why = _rounds_stay(config, done) if field == "rounds" else ""
            moved = hashed and may_have_moved(field, there.get(field), here.get(field))
            if (field != "rounds" or why) and not moved:
                remedy = (
                    f"holds a run with {field}={printable(there.get(field), 300)}, not "
                    f"{here.get(field)}{why}; choose another folder, or delete this one"
                )
                raise InputError("workdir", self.path, remedy)

    def check_inputs(self, config: ConfigDict, inputs: Mapping[str, str]) -> tuple[str, ...]:
        """Refuses to continue a run on data other than those it began with.

        Args:
          config: config of the continued run.
          inputs: hashes of the inputs that it reads; see `inputs_of`.

        Returns:
          A sentence if inputs.json is damaged, so that the data cannot be compared.

        Raises:
          InputError: naming the data that differ.
        """
        known, notes = self._inputs()
        if known is not None:
            check_inputs(self.path, known, config, inputs)
        return notes

    def _inputs(self) -> tuple[dict[str, str] | None, tuple[str, ...]]:
        try:
            return read_inputs(self.path), ()
        except UnreadableError as error:
            unknown = "whether the data are those that the run began with is not known"
            return None, (f"{FILE} cannot be read ({error}): {unknown}",)

    def config(self) -> dict[str, Any]:
        """Returns the flat config of the run in the folder.

        Raises:
          InputError: config.json is missing, or is not a JSON object.
        """
        try:
            return flatten(read_json(self._config_path))
        except (FileNotFoundError, UnreadableError) as error:
            remedy = (
                f"its config.json cannot be read ({_reason(error)}); put a copy of it back, or "
                "choose another folder"
            )
            raise InputError("workdir", self.path, remedy) from error

    @property
    def _config_path(self) -> Path:
        return self.path / CONFIG

    def open(self, config: ConfigDict, inputs: Mapping[str, str] | None = None) -> None:
        """Creates and locks the folder and writes config.json; it then belongs to this experiment.

        If a run continues, its summary is replaced by one with only the time spent so far, since
        metrics.jsonl may be about to lose its last rounds.

        Args:
          config: the config of the experiment.
          inputs: hashes of the inputs that it reads, kept for later continuation.

        Raises:
          InputError: another process works here, or has changed the folder in the meantime.
        """
        self.keep_others_out()
        self.check(config)
        if inputs is not None:
            self.check_inputs(config, inputs)
        summary, seconds = self._summary(), self.seconds()
        ended = (summary.get("status"), summary.get("rounds")) == ("finished", config.rounds)
        if seconds and not ended:
            self.write_summary({"status": "unfinished", "seconds": seconds})
        self._write(self._config_path, json.dumps(as_json(config), indent=2) + "\n")
        if inputs is not None:
            self._write(self.path / FILE, inputs_text(inputs))

    def keep_rounds(self, rounds_done: int, every: int = 1) -> tuple[str, ...]:
        """Cuts metrics.jsonl back to the rounds that the restored checkpoint includes.

        If lines cannot be read, a copy of the former file is kept as metrics-set-aside.jsonl.

        Args:
          rounds_done: number of these rounds.
          every: rounds from one evaluation to the next. A run that ended between two evaluations
            has one of its last round. If it is prolonged, this is left out, as in a run that was
            as long from the start; 1 to keep it.

        Returns:
          Sentences on lost rounds and damaged lines, if there are any.
        """
        history, lines = self.history(), []
        kept = [row for row in history.rows if row["round"] <= rounds_done]
        if kept and kept[-1]["round"] % every:
            kept[-1] = {name: x for name, x in kept[-1].items() if not _of_evaluation(name)}
        lost = missing_rounds(kept, rounds_done)
        if lost:
            lines.append(f"{lost} of the {rounds_done} rounds done are lost from metrics.jsonl")
        if (history.unread or history.repeated) and self.writes:
            aside = _free(self.path / "metrics-set-aside.jsonl")
            with _naming(aside):
                shutil.copyfile(self.metrics_path, aside)
            lines.append(f"metrics.jsonl as it was, with lines that are damaged: {aside.name}")
        self._write(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))
        return tuple(lines)

    @property
    def metrics_path(self) -> Path:
        """Path of metrics.jsonl."""
        return self.path / "metrics.jsonl"

    def append(self, metrics: Metrics) -> None:
        """Appends a round to metrics.jsonl; the line is on disk when this returns."""
        if self.writes:
            with _naming(self.metrics_path), self.metrics_path.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def read(self) -> list[Metrics]:
        """Returns the rounds of metrics.jsonl that can be read, in rising order."""
        return list(self.history().rows)

    def history(self) -> History:
        """Reads metrics.jsonl.

        Raises:
          InputError: it is not a regular file, or is larger than any that a run writes.
        """
        try:
            try:
                most = read_json(self._config_path).get("rounds")
            except (FileNotFoundError, UnreadableError):
                most = None
            return read_history(self.metrics_path, most)
        except UnreadableError as error:
            remedy = f"its metrics.jsonl cannot be read ({error}); move it away"
            raise InputError("workdir", self.path, remedy) from error

    def write_summary(self, summary: Metrics) -> None:
        """Writes summary.json."""
        self._write(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def seconds(self) -> float:
        """Returns the wall time of the run so far, over all sessions; 0 if the files do not say.

        A session that was killed counts up to its last round.
        """
        last = self.read()[-1:]
        said = [self._summary().get("seconds"), *(row.get("time/run_seconds") for row in last)]
        return max((float(s) for s in said if is_number(s) and 0 <= s < float("inf")), default=0.0)

    def _summary(self) -> Metrics:
        try:
            return read_json(self.path / "summary.json")
        except (FileNotFoundError, UnreadableError):
            return {}

    def write_arrays(self, **arrays: np.ndarray) -> None:
        """Writes arrays.npz."""
        if self.writes:
            # Pack in memory: a zip file that cannot be closed raises again when garbage-collected.
            packed = BytesIO()
            np.savez_compressed(packed, allow_pickle=False, **arrays)
            write_atomically(self.path / "arrays.npz", packed.getvalue())

    def _write(self, path: Path, text: str) -> None:
        if self.writes:
            write_atomically(path, text)


def _rounds_stay(config: ConfigDict, done: int) -> str:
    """Returns why a run with `done` rounds cannot use this config's `rounds`; empty if it can."""
    if config.local.decay != "none":
        return f", and its learning rate falls over them all (local.decay={config.local.decay})"
    # The last round is evaluated and saved, so it must not be done yet.
    return "" if config.rounds > done else f", and {done} are done"


def _reason(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) else str(error)


def _of_evaluation(name: str) -> bool:
    """Whether a column of metrics.jsonl is written in rounds with an evaluation alone."""
    return name.startswith("eval/") or "/newcomer_" in name


def _free(path: Path) -> Path:
    """Returns the path, or the first free one of `name-2`, `name-3`, ... if it exists already."""
    others = (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], others) if not os.path.lexists(p))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step: a reader sees the old content or the new, never a part.

    Raises:
      OSError: the file could not be written; it keeps its old content, and no temporary file stays.
    """
    temporary = _temporary(path)
    with _naming(path):
        try:
            # An existing temporary file was left by a killed process, or may not be writable.
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the file's path to errors that do not name it, as those of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
