"""Tables of a study: every number is a mean over seeds with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from experiments.reporting.quantities import MINUS, NOTHING, LossUnit, byte_unit
from experiments.reporting.tables import Table
from experiments.studying.results import Results
from experiments.studying.rows import Row, differences, read_rows
from experiments.studying.statistics import Difference, Estimate, estimate

TARGET = 0.6

# Quantities of `figures`, with their column heads; accuracies are shown in percent.
ACCURACY = {
    "personal/final": "personal",
    "personal/best": "personal, best",
    "global/final": "global",
    "global/best": "global, best",
    "server/final": "server",
    "server/best": "server, best",
}
# Columns that are shown only if a run has the quantity: no mean where clients have rules of their
# own, and the others are missing from runs of older versions.
MEAN = {"mean/final": "mean of the three"}
FURTHER = {
    "personal/p10": "personal, tenth percentile",
    "assembled/final": "assembled",
    "tuned/final": "fine-tuned",
    "newcomer/final": "newcomers",
}
LOSS = {
    "personal_loss/final": "personal",
    "global_loss/final": "global",
    "server_loss/final": "server",
    "assembled_loss/final": "assembled",
    "tuned_loss/final": "fine-tuned",
    "newcomer_loss/final": "newcomers",
}
BALANCE = {
    "assigned/round": "assigned CV",
    "assigned/cumulative": "assigned CV, cumulative",
    "usage/round": "used CV",
    "usage/cumulative": "used CV, cumulative",
}
WALL = "wall/seconds"
COMPARED = {key: head for key, head in ACCURACY.items() if key.endswith("/final")}


def accuracy_sheet(rows: Sequence[Row], axes: Sequence[str], title: str) -> Table:
    """Tabulates the accuracies of all rows, in percent."""
    mean, further = _known(rows, MEAN), _known(rows, FURTHER)
    one = "; assembled: all experts in one model" if "assembled/final" in further else ""
    if "tuned/final" in further:
        one += "; fine-tuned: personal, after one more round for itself alone"
    if "newcomer/final" in further:
        one += "; newcomers: clients that took no part in training, on what is their own"
    return _sheet(
        f"{title}: accuracy",
        rows,
        axes,
        {head: partial(_percent_of, key) for key, head in (ACCURACY | mean | further).items()},
        "Percent, mean ± 95 % interval over seeds (Student t). Personal: clients on what is their "
        "own; global: the same clients on the whole test set; server: all clients' joint "
        f"prediction{one}.",
    )


def loss_sheet(rows: Sequence[Row], axes: Sequence[str], title: str) -> Table | None:
    """Tabulates the test losses of all rows; None if no run recorded any."""
    known = _known(rows, LOSS)
    if not known:
        return None
    unit = rows[0].unit
    return _sheet(
        unit.titled(f"{title}: loss"),
        rows,
        axes,
        {head: partial(_loss_of, key, unit) for key, head in known.items()},
        "Loss on the test set at the end, lower is better: mean ± 95 % interval over seeds "
        "(Student t), of the same models as the accuracies.",
    )


def cost_sheet(rows: Sequence[Row], axes: Sequence[str], title: str, target: float) -> Table:
    """Tabulates balance, cost of reaching the target, and wall time of all rows."""
    columns: dict[str, Callable[[Row], str]] = {
        head: partial(_number_of, key, 3) for key, head in BALANCE.items()
    }
    factor, unit = _byte_unit_of(rows, "down/bytes", "up/bytes")
    for word in ("down", "up"):
        columns[f"{unit} {word}"] = partial(_size_of, f"{word}/bytes", factor)
    columns[f"rounds to {100 * target:g} %"] = partial(_reached, "target/rounds", 1.0)
    factor, unit = _byte_unit_of(rows, "target/bytes")
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
        "end of the load summed over rounds. Down and up: bytes to and from the clients, of the "
        "whole run. The target is of global accuracy; where not every seed reached it, the mean is "
        "over those that did, whose number is in brackets.",
    )


def difference_sheet(
    rows: Sequence[Row], axes: Sequence[str], title: str, reference: str
) -> Table | None:
    """Tabulates accuracies, method minus reference; None if there is nothing to compare."""
    shown = partial(percent, signed=True)
    return _differences(
        rows,
        axes,
        f"{title}: difference from {reference}",
        reference,
        COMPARED | _known(rows, MEAN),
        shown,
        "Percentage points",
    )


def loss_difference_sheet(
    rows: Sequence[Row], axes: Sequence[str], title: str, reference: str
) -> Table | None:
    """Tabulates losses, method minus reference; None if there is nothing to compare."""
    known = _known(rows, LOSS)
    if not known:
        return None
    unit = rows[0].unit
    shown = partial(_loss, unit=unit, signed=True)
    return _differences(
        rows,
        axes,
        f"{title}: difference in loss from {reference}",
        reference,
        known,
        shown,
        unit.titled("Loss"),
    )


def _differences(
    rows: Sequence[Row],
    axes: Sequence[str],
    title: str,
    reference: str,
    columns: Mapping[str, str],
    shown: Callable[[Estimate], str],
    unit: str,
) -> Table | None:
    """Tabulates method minus reference, seed by seed; None if there is nothing to compare."""
    heads = [*axes, "method", "pairs"]
    for head in columns.values():
        heads += [head, "p (Holm)"]
    lines = []
    by_column = [differences(rows, reference, key) for key in columns]
    for row, *of_row in zip(rows, *by_column, strict=True):
        found = [d for d in of_row if d is not None]
        if not found:
            continue
        cells = [*row.variant, row.method, str(max(d.n for d in found))]
        for d in found:
            cells += [shown(Estimate(d.n, d.mean, d.margin)), p_values(d)]
        lines.append(tuple(cells))
    if not lines:
        return None
    return Table(
        tuple(heads),
        tuple(lines),
        title,
        f"{unit}, method minus {reference} on the same seed: mean ± 95 % interval; p of "
        "the paired t-test, two-sided, and in brackets corrected for the number of comparisons in "
        "its column (Holm).",
        len(axes) + 1,
    )


def sheets(results: Results, target: float = TARGET, reference: str = "") -> list[Table]:
    """Returns all tables of a study."""
    reference = results.reference(reference)
    rows = read_rows(results, target)
    return [
        table
        for task in results.tasks
        for table in sheets_of(
            [row for row in rows if row.task == task], results.axes, target, reference
        )
    ]


def sheets_of(
    rows: Sequence[Row], axes: Sequence[str], target: float, reference: str
) -> list[Table]:
    """Returns the tables of a data set and partition: up to five."""
    title = " · ".join(rows[0].task)
    made = (
        accuracy_sheet(rows, axes, title),
        loss_sheet(rows, axes, title),
        cost_sheet(rows, axes, title, target),
        difference_sheet(rows, axes, title, reference),
        loss_difference_sheet(rows, axes, title, reference),
    )
    return [table for table in made if table is not None]


def number(value: Estimate, digits: int, signed: bool = False) -> str:
    """Formats a mean with its margin; a dash for no seeds, the mean alone for one seed."""
    if not value.n:
        return NOTHING
    text = f"{value.mean:{'+' if signed else ''}.{digits}f}".replace("-", MINUS)
    return text if math.isnan(value.margin) else f"{text} ± {value.margin:.{digits}f}"


def percent(value: Estimate, signed: bool = False) -> str:
    """Formats a fraction with its margin, in percent."""
    return number(Estimate(value.n, 100 * value.mean, 100 * value.margin), 1, signed)


def _loss(value: Estimate, unit: LossUnit, signed: bool = False) -> str:
    """Formats a loss with its margin, in the unit."""
    scaled = Estimate(value.n, value.mean / unit.nats, value.margin / unit.nats)
    return number(scaled, 3, signed)


def _loss_of(key: str, unit: LossUnit, row: Row) -> str:
    return _loss(estimate(row.values(key)), unit)


def _known(rows: Sequence[Row], columns: Mapping[str, str]) -> dict[str, str]:
    """Selects the columns for which at least one run has a value."""
    return {key: head for key, head in columns.items() if any(row.values(key) for row in rows)}


def _percent_of(key: str, row: Row) -> str:
    return percent(estimate(row.values(key)))


def _number_of(key: str, digits: int, row: Row) -> str:
    return number(estimate(row.values(key)), digits)


def _size_of(key: str, factor: float, row: Row) -> str:
    return number(estimate([value / factor for value in row.values(key)]), 2)


def _byte_unit_of(rows: Sequence[Row], *keys: str) -> tuple[float, str]:
    """Returns the unit that suits the largest of some numbers of bytes."""
    return byte_unit(
        max((value for row in rows for key in keys for value in row.values(key)), default=0.0)
    )


def _reached(key: str, unit: float, row: Row) -> str:
    """Formats the cost of reaching the target, and the number of seeds that did if not all did."""
    values = row.values(key)
    done = len(row.seeds)
    if not done:
        return NOTHING
    if not values:
        return f"{NOTHING} (0 of {done})"
    text = number(estimate([value / unit for value in values]), 1)
    return text if len(values) == done else f"{text} ({len(values)} of {done})"


def p_value(p: float) -> str:
    """Formats a p-value; a dash for NaN."""
    if math.isnan(p):
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_values(found: Difference) -> str:
    """Formats the p-value of a difference, and in brackets the corrected one."""
    return (
        p_value(found.p) if math.isnan(found.p) else f"{p_value(found.p)} ({p_value(found.holm)})"
    )


def _sheet(
    title: str,
    rows: Sequence[Row],
    axes: Sequence[str],
    columns: Mapping[str, Callable[[Row], str]],
    note: str,
) -> Table:
    lines = []
    for row in rows:
        done = str(row.asked) if len(row.seeds) == row.asked else f"{len(row.seeds)} of {row.asked}"
        cells = [cell(row) for cell in columns.values()]
        lines.append((*row.variant, row.method, done, *cells))
    return Table((*axes, "method", "seeds", *columns), tuple(lines), title, note, len(axes) + 1)
