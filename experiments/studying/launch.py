"""The command line of a run, and the last line of its output."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.studying.study import Study, Trial
from flexmoe_jax.errors import printable

# Flags for a child of a sweep: it ends with the sweep, and does not join the distributed program
# that the batch queue may describe.
AS_CHILD = ("--end_with_input", "--distributed=off")


def command(study: Study, trial: Trial, workdir: Path) -> list[str]:
    """Returns the command line of a run, valid in the current folder."""
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
    """Formats a command as a user types it in a shell."""
    return shlex.join(["python", *words[1:]])


def _flag(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def last_line(log: Path, start: int) -> str:
    """Returns the last line that is not blank, of those written to a file from byte `start` on."""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        # Only the end is read: a log may be long.
        file.seek(max(start, end - 20_000))
        lines = file.read().decode(errors="replace").split("\n")
    return printable(next((line.strip() for line in reversed(lines) if line.strip()), ""))
