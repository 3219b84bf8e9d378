"""Tables of a study: every number a mean over seeds with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from experiments.reporting.quantities import MINUS, NOTHING, byte_unit
from experiments.reporting.runs import Run
from experiments.studying.results import Results, figures
from experiments.studying.statistics import Difference, Estimate, estimate, paired_difference

TARGET = 0.6

# Quantities of `figures`, with the head of their column; accuracies are shown in percent.
ACCURACY = {
    "personal/final": "personal",
    "personal/best": "personal, best",
    "global/final": "global",
    "global/best": "global, best",
    "server/final": "server",
    "server/best": "server, best",
    "mean/final": "mean of the three",
}
BALANCE = {
    "assigned/round": "assigned CV",
    "assigned/cumulative": "assigned CV, cumulative",
    "usage/round": "used CV",
    "usage/cumulative": "used CV, cumulative",
}
WALL = "wall/seconds"
COMPARED = {key: ACCURACY[key] for key in ACCURACY if key.endswith("/final")}


@dataclass(frozen=True)
class Sheet:
    """A table as text.

    Attributes:
      title: what it is about.
      heads: one a column; the first `words` columns are words, the others numbers.
      rows: of as many cells each.
      note: how to read it.
      words: number of columns that hold words.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    words: int


@dataclass(frozen=True)
class Row:
    """One method on one task: a line of every table.

    Attributes:
      task: data set and partition.
      variant: names on the further axes.
      method: its name.
      asked: number of seeds that the study asks for.
      seeds: seed to what `figures` says, of the finished runs.
    """

    task: tuple[str, str]
    variant: tuple[str, ...]
    method: str
    asked: int
    seeds: Mapping[int, Mapping[str, float]]

    def values(self, key: str) -> list[float]:
        """The quantity of every seed that has it."""
        return [found[key] for found in self.seeds.values() if key in found]

    def against(self, reference: Row, key: str) -> Difference:
        """This minus the reference, over the seeds that both have."""
        both = [
            (found[key], reference.seeds[seed][key])
            for seed, found in self.seeds.items()
            if key in found and key in reference.seeds.get(seed, {})
        ]
        return paired_difference([ours for ours, _ in both], [theirs for _, theirs in both])


def read_rows(results: Results, target: float = TARGET) -> list[Row]:
    """All rows of a study, in its order, those without a finished run included."""
    asked: dict[tuple[tuple[str, str], tuple[str, ...], str], int] = {}
    for trial in (result.trial for result in results.results):
        names = tuple(name for _, name in trial.variant)
        key = (trial.dataset, trial.partition), names, trial.method
        asked[key] = asked.get(key, 0) + 1

    def read(seeds: Mapping[int, Run]) -> dict[int, Mapping[str, float]]:
        return {seed: figures(run, target) for seed, run in seeds.items()}

    found = {task: results.of(task) for task in results.tasks}
    return [
        Row(task, variant, method, asked[task, variant, method], read(seeds))
        for task in results.tasks
        for (variant, method), seeds in found[task].items()
    ]


def reference_of(row: Row, rows: Sequence[Row], method: str) -> Row | None:
    """The row of the reference method on the same task and variant."""
    wanted = row.task, row.variant, method
    return next((r for r in rows if (r.task, r.variant, r.method) == wanted), None)


def accuracy_sheet(rows: Sequence[Row], axes: Sequence[str], title: str) -> Sheet:
    """Accuracies of all rows, in percent."""
    return _sheet(
        f"{title}: accuracy",
        rows,
        axes,
        {head: partial(_percent_of, key) for key, head in ACCURACY.items()},
        "Percent, mean ± 95 % interval over seeds (Student t). Personal: clients on their own "
        "label mix; global: the same clients on the whole test set; server: all clients' joint "
        "prediction.",
    )


def cost_sheet(rows: Sequence[Row], axes: Sequence[str], title: str, target: float) -> Sheet:
    """Balance, what it took to reach the target, and wall time of all rows."""
    most = max((value for row in rows for value in row.values("target/bytes")), default=0.0)
    factor, unit = byte_unit(most)
    columns: dict[str, Callable[[Row], str]] = {
        head: partial(_number_of, key, 3) for key, head in BALANCE.items()
    }
    columns[f"rounds to {100 * target:g} %"] = partial(_reached, "target/rounds", 1.0)
    columns[f"{unit} to it"] = partial(_reached, "target/bytes", factor)
    if any(row.values("target/seconds") for row in rows):
        columns["simulated s to it"] = partial(_reached, "target/seconds", 1.0)
    columns["wall s"] = partial(_number_of, WALL, 1)
    return _sheet(
        f"{title}: balance and cost",
        rows,
        axes,
        columns,
        "CV: standard deviation over mean across experts, 0 is even; mean over rounds, and at the "
        "end of the load summed over rounds. The target is of global accuracy; where not every "
        "seed reached it, the mean is over those that did, whose number is in brackets.",
    )


def difference_sheet(
    rows: Sequence[Row], axes: Sequence[str], title: str, reference: str
) -> Sheet | None:
    """Every method minus the reference, seed by seed; None where there is nothing to compare."""
    pairs = [
        (row, other)
        for row in rows
        if row.method != reference and (other := reference_of(row, rows, reference)) is not None
    ]
    if not pairs:
        return None
    heads = [*axes, "method", "pairs"]
    for head in COMPARED.values():
        heads += [head, "p"]
    lines = []
    for row, other in pairs:
        found = [row.against(other, key) for key in COMPARED]
        cells = [*row.variant, row.method, str(max(d.n for d in found))]
        for d in found:
            cells += [percent(Estimate(d.n, d.mean, d.margin), signed=True), p_value(d.p)]
        lines.append(tuple(cells))
    return Sheet(
        f"{title}: difference from {reference}",
        tuple(heads),
        tuple(lines),
        f"Percentage points, method minus {reference} on the same seed: mean ± 95 % interval; p of "
        "the paired t-test, two-sided, not corrected for the number of comparisons.",
        len(axes) + 1,
    )


def sheets(results: Results, target: float = TARGET, reference: str = "") -> list[Sheet]:
    """All tables of a study: three for every pair of data set and partition."""
    reference = results.reference(reference)
    rows = read_rows(results, target)
    made: list[Sheet | None] = []
    for task in results.tasks:
        here = [row for row in rows if row.task == task]
        title = " · ".join(task)
        made.append(accuracy_sheet(here, results.axes, title))
        made.append(cost_sheet(here, results.axes, title, target))
        made.append(difference_sheet(here, results.axes, title, reference))
    return [sheet for sheet in made if sheet is not None]


def number(value: Estimate, digits: int, signed: bool = False) -> str:
    """A mean with its margin; a dash for nothing, the mean alone for one seed."""
    if not value.n:
        return NOTHING
    text = f"{value.mean:{'+' if signed else ''}.{digits}f}".replace("-", MINUS)
    return text if math.isnan(value.margin) else f"{text} ± {value.margin:.{digits}f}"


def percent(value: Estimate, signed: bool = False) -> str:
    """A fraction with its margin, in percent."""
    return number(Estimate(value.n, 100 * value.mean, 100 * value.margin), 1, signed)


def _percent_of(key: str, row: Row) -> str:
    return percent(estimate(row.values(key)))


def _number_of(key: str, digits: int, row: Row) -> str:
    return number(estimate(row.values(key)), digits)


def _reached(key: str, unit: float, row: Row) -> str:
    """What it took to reach the target, and how many seeds did where not all did."""
    values = row.values(key)
    done = len(row.seeds)
    if not done:
        return NOTHING
    if not values:
        return f"{NOTHING} (0 of {done})"
    text = number(estimate([value / unit for value in values]), 1)
    return text if len(values) == done else f"{text} ({len(values)} of {done})"


def p_value(p: float) -> str:
    """A p-value as it is printed."""
    if math.isnan(p):
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _sheet(
    title: str,
    rows: Sequence[Row],
    axes: Sequence[str],
    columns: Mapping[str, Callable[[Row], str]],
    note: str,
) -> Sheet:
    lines = []
    for row in rows:
        done = str(row.asked) if len(row.seeds) == row.asked else f"{len(row.seeds)} of {row.asked}"
        cells = [cell(row) for cell in columns.values()]
        lines.append((*row.variant, row.method, done, *cells))
    return Sheet(title, (*axes, "method", "seeds", *columns), tuple(lines), note, len(axes) + 1)
