"""Shows the progress of a run: one row per evaluation, and a progress bar on a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from experiments.reporting.quantities import LOSS_UNITS, UNNAMED, is_loss
from flexmoe_jax.errors import printable


def columns(task: str, newcomers: bool = False) -> tuple[tuple[str, str, str], ...]:
    """Returns heading, key in metrics.jsonl and format of each column.

    Only classification has accuracies; the other tasks show losses.
    """
    measure = "accuracy" if task == "classification" else "loss"
    judged = ("personal", "global", "server", *(["newcomer"] if newcomers else []))
    return (
        ("round", "round", "{:d}"),
        ("loss", "train/loss", "{:.3f}"),
        *((word, f"eval/{word}_{measure}", "{:.3f}") for word in judged),
        ("assigned CV, sum", "load/assigned_cv_cumulative", "{:.3f}"),
        ("used CV, sum", "load/usage_cv_cumulative", "{:.3f}"),
        ("s/round", "time/round_seconds", "{:.2f}"),
    )


class ProgressDisplay:
    """Live display of a run, used as a context manager.

    Args:
      rounds: T.
      done: rounds completed before this start.
      quiet: show nothing; only one process of a run has a display.
      task: the learning task; it determines which figures are shown, and the unit of losses.
      newcomers: whether some clients are kept out of training; they then have a column.
    """

    def __init__(
        self,
        rounds: int,
        done: int,
        quiet: bool = False,
        task: str = "classification",
        newcomers: bool = False,
    ) -> None:
        """Prepares the display; nothing is shown yet."""
        self._columns, self._unit = columns(task, newcomers), LOSS_UNITS.get(task, UNNAMED)
        self._in_losses = task != "classification"
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
        if self._in_losses:
            unit = f" in {self._unit.name}" if self._unit.name else ""
            self.say(f"all losses{unit}: of training, and of clients and server on the test set")
        self.say("  ".join(f"{heading:>8}" for heading, _, _ in self._columns), style="bold")
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
        # The first round includes compilation, so the pace is measured from its end.
        self._start = self._start or (now, done)
        paced = done - self._start[1]
        left = (now - self._start[0]) / paced * (self._rounds - done) if paced else None
        self._progress.update(
            self._task,
            completed=done,
            loss=self._cell("train/loss", "{:.3f}", metrics),
            left="" if left is None else f"{left:.0f} s left",
        )
        if "eval/clients" in metrics:
            cells = (
                f"{self._cell(key, form, metrics):>{max(8, len(heading))}}"
                for heading, key, form in self._columns
            )
            self.say("  ".join(cells))

    def _cell(self, key: str, form: str, metrics: Mapping[str, Any]) -> str:
        if key not in metrics:
            return "-"
        return form.format(metrics[key] / self._unit.nats if is_loss(key) else metrics[key])
