"""The command of a run, and what it said."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.studying.study import Study, Trial
from flexmoe_jax.errors import printable

# For a child of a sweep: it ends with the sweep, and is no part of the batch queue's program.
AS_CHILD = ("--end_with_input", "--distributed=off")


def command(study: Study, trial: Trial, workdir: Path) -> list[str]:
    """The command line of a run; it works from the current folder."""
    config = study.config_file.resolve()
    here = Path.cwd()
    return [
        sys.executable,
        "-m",
        "experiments.train",
        f"--config={config.relative_to(here) if config.is_relative_to(here) else config}",
        f"--workdir={workdir / trial.name}",
        *(f"--config.{name}={_flag(value)}" for name, value in trial.overrides.items()),
    ]


def as_typed(words: Sequence[str]) -> str:
    """A command as one types it."""
    return shlex.join(["python", *words[1:]])


def _flag(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def last_line(log: Path, start: int) -> str:
    """The last line with words in it of what was written to a file from byte `start` on."""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        # The end alone: a log may be long.
        file.seek(max(start, end - 20_000))
        lines = file.read().decode(errors="replace").split("\n")
    return printable(next((line.strip() for line in reversed(lines) if line.strip()), ""))
