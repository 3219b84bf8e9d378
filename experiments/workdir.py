"""The folder of a run: config.json, inputs.json, metrics.jsonl, summary.json, arrays.npz.

Beside them lie checkpoints/ and report/. One process at a time works there, and has the empty file
run.lock locked for as long. Files are replaced in one step, so a process killed at any moment, or a
full disk, leaves the old file or the new one. Only metrics.jsonl grows line by line; lines of it
that are damaged are lost, and no others.
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

# Fields, and groups of them, that say where and how a run is computed, not what: a run may be
# moved, and go on elsewhere.
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
    """The config as plain JSON values."""
    plain: dict[str, Any] = json.loads(config.to_json())
    return plain


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to a flat one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def incidental(field: str) -> bool:
    """Whether runs that differ in a field are nevertheless the same experiment."""
    return any(field == name or field.startswith(f"{name}.") for name in INCIDENTAL)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The fields, sorted, that make two flat configs different experiments; None is no value."""
    fields = sorted(one.keys() | other.keys())
    return [f for f in fields if not incidental(f) and one.get(f) != other.get(f)]


class Workdir:
    """The folder of one run; nothing is written before `open`.

    Args:
      path: of the folder.
      writes: False in all processes of a run but one: they read, and leave the files alone.
    """

    def __init__(self, path: str | os.PathLike[str], writes: bool = True) -> None:
        """Only remembers the path."""
        self.path = Path(path)
        self.writes = writes
        self._unlock: Callable[[], object] | None = None

    def keep_others_out(self, create: bool = True) -> None:
        """Lets no other process begin here, for as long as this object lives.

        Args:
          create: make the folder, if need be; otherwise one where no run has been is left as it is.

        Raises:
          InputError: another process is at work here.
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
        """Whether another process is at work here."""
        probe = Workdir(self.path)
        try:
            probe.keep_others_out(create=False)
        except InputError:
            return True
        if probe._unlock:
            probe._unlock()
        return False

    def check(self, config: ConfigDict) -> None:
        """Refuses a folder that holds another experiment, or something else altogether.

        Incidental fields may differ from those of the run that is there, and `rounds`, as long as
        some are left and no learning rate was scheduled over the former number. So may the paths of
        files whose hashes the folder holds: `check_inputs` compares these.

        Raises:
          InputError: naming the first field that differs.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError("workdir", self.path, "is a file; choose a folder")
        existing = self._config_path
        if not existing.exists():
            # A process killed in `open` may leave its temporary file, and leaves its lock's.
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
        """Refuses to go on with other data than the run that is there began with.

        Args:
          config: of the run as it is to go on.
          inputs: hashes of what it reads; see `inputs_of`.

        Returns:
          A sentence where that cannot be known, since inputs.json is damaged.

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
        """The flat config of the run that is there.

        Raises:
          InputError: config.json is missing, or no JSON object.
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
        return self.path / "config.json"

    def open(self, config: ConfigDict, inputs: Mapping[str, str] | None = None) -> None:
        """Makes the folder, locks it and writes config.json; from here on it is this experiment's.

        Of a run that goes on, the summary no longer says how it ended, only how long it took so
        far: metrics.jsonl may be about to lose its last rounds.

        Args:
          config: of the experiment.
          inputs: hashes of what it reads, kept for those who go on with it.

        Raises:
          InputError: another process is at work here, or has been meanwhile.
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

    def keep_rounds(self, rounds_done: int) -> tuple[str, ...]:
        """Cuts metrics.jsonl back to the rounds that the restored checkpoint holds.

        A file with lines that cannot be read is kept beside it as it was, in metrics-set-aside.

        Returns:
          A sentence on what is lost, if anything is.
        """
        history, lines = self.history(), []
        kept = [row for row in history.rows if row["round"] <= rounds_done]
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
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    def append(self, metrics: Metrics) -> None:
        """Adds a round to metrics.jsonl; it is on disk when this returns."""
        if self.writes:
            with _naming(self.metrics_path), self.metrics_path.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def read(self) -> list[Metrics]:
        """The rounds in metrics.jsonl that can be read, rising."""
        return list(self.history().rows)

    def history(self) -> History:
        """What metrics.jsonl tells.

        Raises:
          InputError: it is no file, or larger than any that a run writes.
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
        """Wall time of the run so far, in all sessions; 0 where the files say nothing of the kind.

        Of a session that was killed, the time up to its last round.
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
            # In memory first: a zip file that cannot be closed complains once more when collected.
            packed = BytesIO()
            np.savez_compressed(packed, allow_pickle=False, **arrays)
            write_atomically(self.path / "arrays.npz", packed.getvalue())

    def _write(self, path: Path, text: str) -> None:
        if self.writes:
            write_atomically(path, text)


def _rounds_stay(config: ConfigDict, done: int) -> str:
    """Why a run with `done` rounds cannot have those of this config; empty where it can."""
    if config.local.decay != "none":
        return f", and its learning rate falls over them all (local.decay={config.local.decay})"
    # The last round is one that is evaluated and saved, so it must still be to come.
    return "" if config.rounds > done else f", and {done} are done"


def _reason(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) else str(error)


def _free(path: Path) -> Path:
    """The path, or the first of `name-2`, `name-3`, ... where something is there already."""
    others = (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], others) if not os.path.lexists(p))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step: a reader sees the old content or the new, never a part.

    Raises:
      OSError: it could not be written; the old content is still there, and nothing beside it.
    """
    temporary = _temporary(path)
    with _naming(path):
        try:
            # What lies there is of a killed process, or nothing that may be written to.
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
    """Puts the file into errors that do not name it, as those of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
