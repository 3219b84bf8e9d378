"""The folder of a run: config.json, metrics.jsonl, summary.json, arrays.npz, checkpoints/.

Files are replaced in one step, so a process killed at any moment, or a full disk, leaves the old
file or the new one. Only metrics.jsonl grows line by line; what is wrong with its end is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.cli import flat_fields
from flexmoe_jax.errors import InputError

Metrics = dict[str, Any]

# Fields, and groups of them, that say where and how a run is computed, not what: a run may be
# moved, and go on elsewhere.
INCIDENTAL = (
    "data.dir",
    "data.download",
    "execution",
    "eval.batch_size",
    "checkpoint",
    "tensorboard",
)


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values."""
    plain: dict[str, Any] = json.loads(config.to_json())
    return plain


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

    def check(self, config: ConfigDict) -> None:
        """Refuses a folder that holds another experiment, or something else altogether.

        Incidental fields may differ from those of the run that is there, and `rounds`, as long as
        some are left and no learning rate was scheduled over the former number.

        Raises:
          InputError: naming the first field that differs.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError("workdir", self.path, "is a file; choose a folder")
        existing = self._config_path
        if not existing.exists():
            # A process killed in `open` may leave its temporary file.
            if any(path != _temporary(existing) for path in self.path.iterdir()):
                remedy = "holds files but no run; choose an empty or a new folder"
                raise InputError("workdir", self.path, remedy)
            return
        there, here = self.config(), flat_fields(ConfigDict(as_json(config)))
        for field in differing(there, here):
            why = self._rounds_stay(config) if field == "rounds" else ""
            if field != "rounds" or why:
                remedy = (
                    f"holds a run with {field}={there.get(field)}, not {here.get(field)}{why}; "
                    "choose another folder, or delete this one"
                )
                raise InputError("workdir", self.path, remedy)

    def _rounds_stay(self, config: ConfigDict) -> str:
        """Why the run that is there cannot have another number of rounds; empty where it can."""
        done = len(self.read())
        if config.local.decay != "none":
            return f", and its learning rate falls over them all (local.decay={config.local.decay})"
        # The last round is one that is evaluated and saved, so it must still be to come.
        return "" if config.rounds > done else f", and {done} are done"

    def config(self) -> dict[str, Any]:
        """The flat config of the run that is there.

        Raises:
          InputError: config.json is missing, or no JSON object.
        """
        try:
            return flat_fields(ConfigDict(dict(json.loads(self._config_path.read_bytes()))))
        except (FileNotFoundError, ValueError, TypeError) as error:
            remedy = "its config.json cannot be read; choose another folder, or delete this one"
            raise InputError("workdir", self.path, remedy) from error

    @property
    def _config_path(self) -> Path:
        return self.path / "config.json"

    def open(self, config: ConfigDict) -> None:
        """Makes the folder and writes config.json; from here on it is this experiment's.

        Of a run that was finished, and now is to have more rounds, the summary no longer says so.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        summary = self._summary()
        if summary.get("status") == "finished" and summary.get("rounds") != config.rounds:
            self.write_summary({"status": "unfinished", "seconds": self.seconds()})
        self._write(self._config_path, json.dumps(as_json(config), indent=2) + "\n")

    def keep_rounds(self, rounds_done: int) -> None:
        """Cuts metrics.jsonl back to the rounds that the restored checkpoint holds."""
        kept = [json.dumps(row) + "\n" for row in self.read()[:rounds_done]]
        self._write(self.metrics_path, "".join(kept))

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
        """The rounds in metrics.jsonl, from the first to the last before anything is amiss."""
        rows: list[Metrics] = []
        if self.metrics_path.exists():
            for line in self.metrics_path.read_bytes().split(b"\n"):
                try:
                    row = json.loads(line)
                except ValueError:
                    break
                if not isinstance(row, dict) or row.get("round") != len(rows) + 1:
                    break
                rows.append(row)
        return rows

    def write_summary(self, summary: Metrics) -> None:
        """Writes summary.json."""
        self._write(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def seconds(self) -> float:
        """Wall time that summary.json states, or 0 where it says nothing of the kind."""
        try:
            return float(self._summary()["seconds"])
        except (ValueError, TypeError, KeyError):
            return 0.0

    def _summary(self) -> Metrics:
        try:
            return dict(json.loads((self.path / "summary.json").read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
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


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step: a reader sees the old content or the new, never a part.

    Raises:
      OSError: it could not be written; the old content is still there, and nothing beside it.
    """
    temporary = _temporary(path)
    with _naming(path):
        try:
            with temporary.open("wb") as file:
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
