"""The folder of a run: config.json, metrics.jsonl, summary.json, arrays.npz, checkpoints/."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.cli import flat_fields
from flexmoe_jax.errors import InputError

Metrics = dict[str, Any]


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values."""
    plain: dict[str, Any] = json.loads(config.to_json())
    return plain


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

        Raises:
          InputError: naming the first field that differs.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError("workdir", self.path, "is a file; choose a folder")
        existing = self.path / "config.json"
        if not existing.exists():
            if any(self.path.iterdir()):
                remedy = "holds files but no run; choose an empty or a new folder"
                raise InputError("workdir", self.path, remedy)
            return
        try:
            there = flat_fields(ConfigDict(json.loads(existing.read_text())))
        except (ValueError, TypeError) as error:
            remedy = "its config.json cannot be read; choose another folder, or delete this one"
            raise InputError("workdir", self.path, remedy) from error
        here = flat_fields(ConfigDict(as_json(config)))
        for field in sorted(there.keys() | here.keys()):
            if there.get(field) != here.get(field):
                remedy = (
                    f"holds a run with {field}={there.get(field)}, not {here.get(field)}; "
                    "choose another folder, or delete this one"
                )
                raise InputError("workdir", self.path, remedy)

    def open(self, config: ConfigDict) -> None:
        """Makes the folder and writes config.json; from here on it is this experiment's."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(self.path / "config.json", json.dumps(as_json(config), indent=2) + "\n")

    def keep_rounds(self, rounds_done: int) -> None:
        """Cuts metrics.jsonl back to the rounds that the newest checkpoint holds."""
        kept = [json.dumps(row) + "\n" for row in self.read() if row["round"] <= rounds_done]
        self._write(self.metrics_path, "".join(kept))

    @property
    def metrics_path(self) -> Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    def append(self, metrics: Metrics) -> None:
        """Adds a round to metrics.jsonl; it is on disk when this returns."""
        if self.writes:
            with self.metrics_path.open("a") as file:
                file.write(json.dumps(metrics) + "\n")

    def read(self) -> list[Metrics]:
        """The rounds in metrics.jsonl; a last line cut off by a kill is left out."""
        rows: list[Metrics] = []
        if self.metrics_path.exists():
            for line in self.metrics_path.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return rows

    def write_summary(self, summary: Metrics) -> None:
        """Writes summary.json."""
        self._write(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def summary(self) -> Metrics | None:
        """summary.json, if it is there."""
        path = self.path / "summary.json"
        if not path.exists():
            return None
        summary: Metrics = json.loads(path.read_text())
        return summary

    def write_arrays(self, **arrays: np.ndarray) -> None:
        """Writes arrays.npz."""
        if not self.writes:
            return
        temporary = self.path / "arrays.tmp.npz"
        np.savez_compressed(temporary, allow_pickle=False, **arrays)
        os.replace(temporary, self.path / "arrays.npz")

    def _write(self, path: Path, text: str) -> None:
        if self.writes:
            write_atomically(path, text)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader sees the old text or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
