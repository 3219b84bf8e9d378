"""What the user sees while a run goes on: a row per evaluation, and a bar on a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from flexmoe_jax.errors import printable

# Heading, key in metrics.jsonl, format.
_COLUMNS = (
    ("round", "round", "{:d}"),
    ("loss", "train/loss", "{:.3f}"),
    ("personal", "eval/personal_accuracy", "{:.3f}"),
    ("global", "eval/global_accuracy", "{:.3f}"),
    ("server", "eval/server_accuracy", "{:.3f}"),
    ("assigned CV", "load/assigned_cv_cumulative", "{:.3f}"),
    ("used CV", "load/usage_cv_cumulative", "{:.3f}"),
    ("s/round", "time/round_seconds", "{:.2f}"),
)


class ProgressDisplay:
    """Live display of a run, to be used as a context manager.

    Args:
      rounds: T.
      done: rounds completed before this start.
      quiet: shows nothing, as in all processes of a run but one.
    """

    def __init__(self, rounds: int, done: int, quiet: bool = False) -> None:
        """Prepares the display; nothing is shown yet."""
        self._console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._progress = Progress(
            TextColumn("[bold]round"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=rounds, completed=done, loss="-", left="compiling"
        )
        self._rounds = rounds
        self._start: tuple[float, int] | None = None

    def __enter__(self) -> ProgressDisplay:
        """Starts the display."""
        self._progress.start()
        self.say("  ".join(f"{heading:>8}" for heading, _, _ in _COLUMNS), style="bold")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the display."""
        self._progress.stop()

    def say(self, line: str, style: str = "") -> None:
        """Prints a line above the bar."""
        self._console.print(printable(line), style=style, markup=False)

    def update(self, metrics: Mapping[str, object]) -> None:
        """Shows a finished round."""
        done, now = int(str(metrics["round"])), time.monotonic()
        # The first round compiles, so the pace is taken from its end.
        self._start = self._start or (now, done)
        paced = done - self._start[1]
        left = (now - self._start[0]) / paced * (self._rounds - done) if paced else None
        self._progress.update(
            self._task,
            completed=done,
            loss=f"{metrics.get('train/loss', math.nan):.3f}",
            left="" if left is None else f"{left:.0f} s left",
        )
        if "eval/global_accuracy" in metrics:
            cells = (
                f"{form.format(metrics[key]) if key in metrics else '-':>{max(8, len(heading))}}"
                for heading, key, form in _COLUMNS
            )
            self.say("  ".join(cells))
